"""HTTPS: a certificate that is renewed while the server runs, and what is said of one that is of no use."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import subprocess
from pathlib import Path

import aiohttp
import pytest

from tests.server.serving import Server, carousel


def make_certificate(folder: Path, *, password: str | None = None) -> tuple[Path, Path]:
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    secrecy = ["-nodes"] if password is None else ["-passout", f"pass:{password}"]
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", *secrecy]
    names = ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*new, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


def fingerprint(certificate: Path) -> bytes:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.read_text())).digest()


async def served_fingerprint(url: str) -> bytes:
    host, port = url.removeprefix("https://").split(":")
    pem = await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).digest()


@pytest.mark.prove
async def test_a_renewed_certificate_is_taken_up_and_a_broken_one_is_not(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    flags = ["--tls-certificate", str(certificate), "--tls-key", str(key)]
    with Server(tmp_path / "log", *flags, "--dtype", "float32") as server:
        assert server.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(certificate))
        async with aiohttp.ClientSession() as session:
            body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
            async with session.post(f"{server.url}/v1/completions", json=body, ssl=trusting) as response:
                assert (await response.json())["choices"][0]["text"].startswith(" Paris.")
        first = fingerprint(certificate)
        assert await served_fingerprint(server.url) == first
        certificate.write_text("nothing")
        async with asyncio.timeout(10):
            while "the certificate stays as it was" not in server.log:
                await asyncio.sleep(0.1)
        assert await served_fingerprint(server.url) == first
        make_certificate(tmp_path)
        async with asyncio.timeout(10):
            while await served_fingerprint(server.url) != fingerprint(certificate):
                await asyncio.sleep(0.1)
        assert fingerprint(certificate) != first


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tls-certificate", "c.pem"], "belong together"),
        (["--tls-certificate", "c.pem", "--tls-key", "k.pem"], "No such file or directory"),
    ],
)
def test_wrong_flags_are_one_sentence(flags: list[str], message: str) -> None:
    run = carousel("serve", "--port", "0", *flags)
    assert run.returncode != 0
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_an_encrypted_key_is_told(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, password="secret")
    run = carousel("serve", "--port", "0", "--tls-certificate", str(certificate), "--tls-key", str(key))
    assert run.returncode == 1
    assert "the key is encrypted" in run.stderr


async def test_connections_without_a_handshake_are_counted_and_make_room(tmp_path: Path, model_path: str) -> None:
    certificate, key = make_certificate(tmp_path)
    flags = ["--tls-certificate", str(certificate), "--tls-key", str(key), "--max-connections", "20"]
    with Server(tmp_path / "log", *flags, "--dtype", "float32", "--kv-cache-memory", "64MB") as server:
        host, port = server.url.removeprefix("https://").split(":")
        trusting = ssl.create_default_context(cafile=str(certificate))
        async with aiohttp.ClientSession() as session:
            held = [await asyncio.open_connection(host, int(port)) for _ in range(60)]
            async with session.get(f"{server.url}/health", ssl=trusting) as response:
                assert response.status == 200
            for reader, _ in held[:40]:
                assert await asyncio.wait_for(reader.read(), 10) == b"", "it made room"
            assert not held[-1][0].at_eof()
            for _, writer in held[40:50]:
                writer.write(b"GET / HTTP/1.1\r\n\r\n")  # no TLS at all
                writer.close()
            async with session.get(f"{server.url}/v1/models", ssl=trusting) as response:
                assert response.status == 200
            for _, writer in held:
                writer.close()
    assert "Traceback" not in server.log
    assert "ERROR" not in server.log
