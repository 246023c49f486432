"""Tells whether a proxy of the environment (HTTP_PROXY, NO_PROXY) stands before a server."""

import ipaddress
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


def is_loopback(url: str) -> bool:
    """Say whether a URL names this machine itself: a proxy would look for the server on its own."""
    host = _host(url).rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def proxy_note(url: str) -> str:
    """Return a sentence part about the proxy through which a URL was requested; "" without one."""
    proxies, host = getproxies(), _host(url)
    scheme = url.partition(":")[0].lower()
    key = scheme if proxies.get(scheme) else "all"
    proxy = proxies.get(key)
    if not proxy or is_loopback(url) or proxy_bypass(host):
        return ""
    address = proxy.rpartition("://")[2].rpartition("@")[2]  # without a user and a password
    return (
        f" (through the proxy {address} of {key.upper()}_PROXY, unless NO_PROXY names {host}: add "
        "it to NO_PROXY if the server must be reached without the proxy)"
    )


def _host(url: str) -> str:
    """Return the host of a URL in lower case; "" for one that is no URL, which httpx2 refuses."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
