"""The one exception for bad input."""


class InputError(ValueError):
    """Input from outside that cannot be used.

    The message is one line that says what was found, where, and what was expected: the commands
    print it as it is and exit with code 2.
    """
