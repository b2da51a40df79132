"""`python -m gemma_convert`."""

from gemma_convert.cli.app import main

if __name__ == "__main__":
    main()
