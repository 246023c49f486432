"""Tells what lies on the way to a server: a proxy of the environment, or a public network."""

import ipaddress
import socket
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


def is_exposed(url: str) -> bool:
    """Say whether others can read and change what is sent to a URL: it is http, to an address that
    is neither of this machine nor of a private network, or to a name that cannot be resolved."""
    if url.lower().startswith("https:") or is_loopback(url):
        return False
    try:
        places = socket.getaddrinfo(_host(url), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # UnicodeError: a name that is too long
        return True
    return any(ipaddress.ip_address(place[4][0]).is_global for place in places)


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
