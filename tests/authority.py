"""An authority of the tests' own, for servers that speak TLS."""

import contextlib
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from deployments.embedded_stores import Certificate


@dataclass(frozen=True)
class Authority:
    """An authority of the tests, and a server's certificate by it for 127.0.0.1."""

    bundle: Path
    server: Certificate


def make_authority(
    folder: Path, *, name: str = "127.0.0.1", hours: tuple[int, int] = (-1, 48), is_authority: bool = False
) -> Authority:
    """One that signs a certificate for the tests' loopback servers; its files go into ``folder``.

    ``name`` and ``hours`` from now on are what the server's certificate is good for; ``is_authority``: it says that it is one.
    """
    now = datetime.datetime.now(datetime.UTC)
    root_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Authority of the tests")])

    def builder(subject: x509.Name, key: ec.EllipticCurvePrivateKey, hours: tuple[int, int]) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(root_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(hours=hours[0]))
            .not_valid_after(now + datetime.timedelta(hours=hours[1]))
        )

    root = (
        builder(root_name, root_key, (-48, 48))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    address = x509.IPAddress(ipaddress.ip_address(name))
    server = (
        builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "store")]), server_key, hours)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([address, x509.DNSName("localhost")]), critical=False)
        .sign(root_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "root.pem").write_bytes(root.public_bytes(pem))
    # As a server sends it: its own certificate, then its authority's.
    (folder / "server.pem").write_bytes(server.public_bytes(pem) + root.public_bytes(pem))
    (folder / "server.key").write_bytes(
        server_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return Authority(folder / "root.pem", Certificate(folder / "server.pem", folder / "server.key"))


@contextlib.contextmanager
def tls_server(certificate: Certificate) -> Iterator[str]:
    """A web server on loopback with that certificate, in which there is nothing; its address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
