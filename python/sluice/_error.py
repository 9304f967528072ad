"""The one exception of the package."""

from collections.abc import Iterable


class Error(RuntimeError):
    """Failure of a call of this package; nothing else is raised but TypeError.

    ``code`` is one of ``invalid_argument``, ``unsupported``, ``out_of_memory``, ``corrupt_file``,
    ``io``, ``cuda``, ``transport``, ``peer_timeout``, ``interrupted``, ``internal``. The message
    names the argument or field, what was expected and what came. ``interrupted`` is seen as the
    context of what a signal's handler raised, KeyboardInterrupt for example. ``ranks`` are the peers that are
    missing, gone or out of step, if any are to blame.
    """

    code: str
    ranks: tuple[int, ...]

    def __init__(self, code: str, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.ranks = tuple(ranks)

    def __reduce__(self):
        return type(self), (self.code, str(self), self.ranks)
