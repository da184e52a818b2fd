"What a user did wrong, in one line: the command line prints it and exits with 2."


class BadInput(ValueError):
    "A user's mistake. The message names the input, says what is wrong with it, and what to do."
