"""`python -m commonweight COMMAND`: the command line, without the console script."""

from .cli.main import main

if __name__ == "__main__":
    main()
