"""The one exception of the package."""


class Error(RuntimeError):
    """Failure of a call of this package; nothing else is raised but TypeError.

    ``code`` is one of ``invalid_argument``, ``unsupported``, ``out_of_memory``, ``corrupt_file``,
    ``io``, ``cuda``, ``transport``, ``peer_timeout``, ``internal``. The message
    names the argument or field, what was expected and what came.
    """

    code: str

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self):
        return type(self), (self.code, str(self))
