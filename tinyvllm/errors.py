"What a user did wrong, in one line: the command line prints it and exits with 2."


class BadInput(ValueError):
    "A user's mistake. The message names the input, says what is wrong with it, and what to do."

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code   # for a server: which parameter, OpenAI's name of the mistake
