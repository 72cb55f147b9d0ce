"""`python -m itune`, and what `accelerate launch -m itune` starts."""

from itune.cli import main

if __name__ == "__main__":
    main()
