"""What holds for chats holds where media come in otherwise: media objects, forms, open ports."""

from __future__ import annotations

import ipaddress
import json
import os
import random
import socket
import urllib.error
import urllib.request
from itertools import pairwise
from typing import TYPE_CHECKING

import grpc
import pytest

from chiasm.v1 import chat_pb2
from tests.fakes import bombs
from tests.harness.attack import ANSWERED, ENTRIES, GRPC, REST, Attack, attack, file, url
from tests.harness.attack_target import GOOD_PICTURE, KEYS, Reply, refusal_of
from tests.harness.process_usage import listening_addresses

if TYPE_CHECKING:
    from tests.harness.attack_target import AttackTarget

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

FORBIDDEN, MALFORMED = "media_url_forbidden", "invalid_media_url"
ROWS = [
    attack("loopback", lambda site: url(f"http://127.0.0.1:{site.port}/"), FORBIDDEN),
    attack("a name", lambda site: url(f"http://private.test:{site.port}/"), FORBIDDEN),
    attack("userinfo", lambda site: url(f"http://public.test@127.0.0.1:{site.port}/"), MALFORMED),
    attack("redirect", lambda site: url(f"http://public.test:{site.port}/to-name"), FORBIDDEN),
    attack("a file", lambda site: url(f"file://{site.secret}"), MALFORMED),
    attack("a bomb", lambda _: file(bombs.solid_webp(16383, 10000)), "too_large"),
    attack("junk", lambda _: file(b"not a picture" * 20), "invalid_media"),
]
FILE_NAMES = [
    "../../../../../../../../{folder}/written.png",
    "{folder}/written.png",
    "..\\..\\written.png",
    "written.png\0.txt",
    "%2e%2e%2fwritten.png",
    "x" * 4000,
]
JUNK_BYTES = 64 << 10
JUNK = {
    "random": random.Random(1).randbytes(JUNK_BYTES),
    "pickle": (b"cos\nsystem\n(S'true'\ntR." * JUNK_BYTES)[:JUNK_BYTES],
    "zeros": bytes(JUNK_BYTES),
}


def call_media(target: AttackTarget, entry: str, path: str, row: Attack) -> Reply:
    """Put or estimate a medium, and return how that was refused."""
    (part,) = row.parts(target.site)
    if entry == GRPC:
        media = part.grpc.media
        if path == "/v1/media":
            return call_grpc(target, "PutMedia", chat_pb2.PutMediaRequest(media=media))
        return call_grpc(target, "EstimateMedia", chat_pb2.EstimateMediaRequest(media=media))
    assert isinstance(part.rest, dict)
    body = {"url": part.rest["image_url"]["url"], "modality": "image"}
    return post(target, path, json.dumps(body).encode(), "application/json")


def call_grpc(target: AttackTarget, method: str, request: object) -> Reply:
    metadata = (("authorization", f"Bearer {KEYS['alice']}"),)
    try:
        getattr(target.stub, method)(request, timeout=60, metadata=metadata)
    except grpc.RpcError as error:
        return refusal_of(error)
    return Reply(200, ANSWERED, "")


def post(target: AttackTarget, path: str, body: bytes, content_type: str) -> Reply:
    headers = {"content-type": content_type, "authorization": f"Bearer {KEYS['alice']}"}
    request = urllib.request.Request(target.stack.base_url + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return Reply(response.status, ANSWERED, response.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            content = error.read().decode()
            return Reply(error.code, json.loads(content)["error"]["code"], content)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("path", ["/v1/media", "/v1/media:estimate"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_media_object_is_held_to_the_same_rules(
    target: AttackTarget, entry: str, path: str, row: Attack
) -> None:
    with target.unharmed(f"{row.name} at {path} over {entry}"):
        reply = call_media(target, entry, path, row)

        target.check_reply(reply, row.codes, repr(row.parts(target.site)))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("path", "code"), [("missing", "media_fetch_failed"), ("to-name", FORBIDDEN)]
)
def test_a_fetch_that_failed_is_not_tried_again(
    target: AttackTarget, entry: str, path: str, code: str
) -> None:
    part = url(f"http://public.test:{target.site.port}/{path}")
    before = target.num_allowed

    target.check_reply(target.send(entry, [part]), [code], "")

    assert target.num_allowed == before + 1


def form_of(file_name: str, edge: str = "edge") -> bytes:
    content = [{"type": "image_url", "image_url": {"url": "cid:cat"}}, "What?"]
    request = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
    head = f'--{edge}\r\nContent-Disposition: form-data; name="request"\r\n\r\n'
    body = head.encode() + json.dumps(request).encode() + b"\r\n"
    head = f'--{edge}\r\nContent-Disposition: form-data; name="cat"; filename="{file_name}"\r\n\r\n'
    return body + head.encode() + GOOD_PICTURE + f"\r\n--{edge}--\r\n".encode()


@pytest.mark.parametrize("name", FILE_NAMES, ids=lambda name: name[:30])
def test_names_of_uploads_are_never_used(target: AttackTarget, name: str) -> None:
    folder = target.site.secret.parent
    before = sorted((*folder.iterdir(), *target.stack.state_dir.rglob("*")))
    form = form_of(name.format(folder=folder))

    with target.unharmed(f"an upload named {name[:30]} over {REST}"):
        reply = target.post(form, "multipart/form-data; boundary=edge")

        target.check_reply(reply, [ANSWERED, "invalid_request"], name)
    assert sorted((*folder.iterdir(), *target.stack.state_dir.rglob("*"))) == before


def declared_ports(target: AttackTarget) -> set[int]:
    """Return the ports that the command lines of the services name."""
    ports = set()
    for name in ("encoder-0", "generator", "gateway"):
        words = target.stack.command_line(name)
        for flag, value in pairwise(words):
            if flag in ("--listen", "--grpc-listen", "--metrics-port"):
                ports.add(int(value.rpartition(":")[2]))
    return ports


def test_only_declared_ports_are_open_and_only_on_loopback(target: AttackTarget) -> None:
    found = {address for pid in target.pids.values() for address in listening_addresses(pid)}

    hosts = {ipaddress.ip_address(host.removeprefix("::ffff:")) for host, _ in found}
    assert all(host.is_loopback for host in hosts), hosts
    assert {port for _, port in found} == declared_ports(target)


@pytest.mark.parametrize("kind", JUNK)
def test_every_port_outlives_junk(target: AttackTarget, kind: str) -> None:
    ports = declared_ports(target)
    assert len(ports) >= 4

    with target.unharmed(f"junk to every port: {kind}"):
        for port in ports:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                send_all_that_is_taken(connection, JUNK[kind])


def send_all_that_is_taken(connection: socket.socket, data: bytes) -> None:
    """Send until the other side has had enough, and wait until it closes or falls silent."""
    connection.settimeout(1)
    try:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass
    except OSError:
        return


def test_the_mount_notes_when_a_file_is_read(target: AttackTarget) -> None:
    """The other tests conclude from an old time of access that nobody has read the secret."""
    control = target.site.secret.with_name("control.txt")
    control.write_bytes(target.site.secret.name.encode())
    os.utime(control, (1, 1))
    control.read_bytes()

    assert control.stat().st_atime > 1
    control.unlink()
