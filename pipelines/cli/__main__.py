"""`python -m pipelines.cli`, the entry point of submitted jobs."""

from pipelines.cli.main import main

if __name__ == "__main__":
    main()
