"""What a user sees when a value cannot be used: the key, the value, and what is allowed, in one line."""


class InputError(ValueError):
    """A config value, a file or a download that cannot be used.

    The command line prints ``str(error)`` on one line and exits with status 2; nothing is half-written.

    Args:
        key: the config key (``method.budget``) or the file with its line (``qasper.jsonl:12``).
        value: what was found there.
        allowed: what would work, as a phrase that completes "must be ..." or a whole sentence.
    """

    def __init__(self, key: str, value: object, allowed: str):
        self.key, self.value, self.allowed = key, value, allowed
        super().__init__(" ".join(f"{key}={value}: {allowed}".split()))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:  # it crosses from a measuring process to its parent
        return type(self), (self.key, str(self.value), self.allowed)


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise :class:`InputError` unless ``condition`` holds."""
    if not condition:
        raise InputError(key, value, allowed)
