"""`python -m cifar_transfer.fit`: the command `fit`, as tutorials and schedulers start it."""

from cifar_transfer.cli import start

if __name__ == "__main__":
    start.run("fit")
