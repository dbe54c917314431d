"""x."""


def main(): ...
