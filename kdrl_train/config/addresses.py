"""Checks the addresses of servers in settings."""


def require_no_secret(key: str, address: str | None, variable: str) -> None:
    """Raise ValueError for a server's address that may hold a secret, as settings are written down.

    The message does not repeat the address.
    """
    if address is not None and "://" in address and set(address) & set("@?#"):
        raise ValueError(
            f"{key} must be http://host:port without a user, password or query, got one of @ ? #: "
            f"put the server's token into the environment variable {variable}"
        )
