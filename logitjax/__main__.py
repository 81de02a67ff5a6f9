"""`python -m logitjax`: the console script if it is not on the path."""

from logitjax.commands import main

if __name__ == "__main__":
    main()
