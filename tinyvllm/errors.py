"What a user did wrong, and what a device did: each in one line, which the command line prints."


class BadInput(ValueError):
    "A user's mistake. The message names the input, says what is wrong with it, and what to do."

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code   # for a server: which parameter, OpenAI's name of the mistake


class DeviceError(RuntimeError):
    "The device has failed, hangs or has lost a kernel. No later step of the engine would be right: start a new one."
