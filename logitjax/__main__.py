"""`python -m logitjax`: the console script where it is not on the path."""

from logitjax.commands import main

if __name__ == "__main__":
    main()
