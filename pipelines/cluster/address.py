"""The Ray cluster of RAY_ADDRESS: which it is, and whether it answers. Imports no Ray.

Ray itself tries for minutes to connect to an address where nothing is, and to a port that something else listens on.
"""

import os
import socket
from urllib.parse import urlsplit

PATIENCE_S = 5.0  # for a connection, and for its first answer

# What a client of HTTP/2, which Ray's gRPC is, says first: the preface and settings without any. The server's own
# settings are its answer.
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
SETTINGS_FRAME = 4


def cluster_address() -> str | None:
    """Return RAY_ADDRESS; None where it asks for no cluster."""
    address = os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def require_cluster() -> None:
    """Refuse, within seconds, a RAY_ADDRESS where no Ray answers.

    Raises:
        ValueError: None does.
    """
    address = cluster_address()
    if address is None:
        return
    try:
        _look_for_ray(_host_and_port(address))
    except OSError as error:
        raise no_cluster(address, error.strerror or str(error)) from None


def no_cluster(address: str, reason: str) -> ValueError:
    """Return the refusal of an address where there is no cluster to use."""
    return ValueError(
        f"RAY_ADDRESS={address}: no Ray cluster answers ({reason}); start it, correct the address, or unset "
        "RAY_ADDRESS to train on this machine"
    )


def _host_and_port(address: str) -> tuple[str, int] | None:
    """Return where to connect to; None for an address that is not of this form, which Ray looks at."""
    scheme, separator, rest = address.rpartition("://")
    if scheme in ("http", "https"):
        raise ValueError(
            f"RAY_ADDRESS={address}: that is a job server's address; HOST:PORT of the head is needed, such as "
            f"{urlsplit(address).hostname}:6379; `dml submit --address {address} -- train ...` sends a job"
        )
    if address == "auto":
        from pipelines.cluster.ray_private import address_on_this_machine

        rest = address_on_this_machine()
    elif separator and scheme != "ray":
        return None
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None:
        raise ValueError(f"RAY_ADDRESS={address}: not HOST:PORT, such as 10.0.0.1:6379, or auto, or local")
    return host, port


def _look_for_ray(place: tuple[str, int] | None) -> None:
    """Raise OSError where nothing listens, or what does is no gRPC server."""
    if place is None:
        return
    with socket.create_connection(place, PATIENCE_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0") != "0":  # says nothing before a handshake
            return
        connection.settimeout(PATIENCE_S)
        connection.sendall(HELLO)
        answer = connection.recv(9)
    if len(answer) < 4 or answer[3] != SETTINGS_FRAME:
        raise ConnectionError("what listens there is no Ray")
