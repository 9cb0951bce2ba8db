"""`python -m m2mkd_ds VERB ...`, and what `deepspeed --module m2mkd_ds VERB ...` starts on every rank."""

from m2mkd_ds.cli import main

if __name__ == "__main__":
    main()
