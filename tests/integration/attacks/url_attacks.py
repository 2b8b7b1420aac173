"""Media by URL: other spellings of forbidden hosts, redirects, rebinding, files, bad servers."""

from __future__ import annotations

from tests.harness.attack import ANSWERED, Attack, Part, Site, attack, text, url

FORBIDDEN, MALFORMED = "media_url_forbidden", "invalid_media_url"
FETCH_FAILED, INVALID_MEDIA = "media_fetch_failed", "invalid_media"
TOO_LARGE = "too_large"
PATH = "/picture.png"

# Each leads to the canary for whoever reads it as somebody does.
HOSTS = {
    "127.0.0.1": FORBIDDEN,
    "127.1": MALFORMED,
    "127.0.1": MALFORMED,
    "2130706433": MALFORMED,
    "0x7f000001": MALFORMED,
    "0x7f.0.0.1": MALFORMED,
    "0177.0.0.1": MALFORMED,
    "017700000001": MALFORMED,
    "127.0.0.1.": MALFORMED,
    "127.0.0.01": MALFORMED,
    "0.0.0.0": FORBIDDEN,
    "0": MALFORMED,
    "localhost": FORBIDDEN,
    "LOCALHOST": FORBIDDEN,
    "[::1]": FORBIDDEN,
    "[0:0:0:0:0:0:0:1]": MALFORMED,
    "[::ffff:127.0.0.1]": MALFORMED,
    "[::ffff:7f00:1]": FORBIDDEN,
    "[::127.0.0.1]": MALFORMED,
    "[64:ff9b::7f00:1]": FORBIDDEN,
    "[64:ff9b:1::7f00:1]": FORBIDDEN,
    "[2002:7f00:1::]": FORBIDDEN,
    "[2001:0:7f00:1::1]": FORBIDDEN,
    "[::1%25lo]": MALFORMED,
    "[::1": MALFORMED,
    "①②⑦.⓪.⓪.①": MALFORMED,
    "127。0。0。1": MALFORMED,
    "%31%32%37.0.0.1": MALFORMED,
    "public.test@127.0.0.1": MALFORMED,
    "user:password@127.0.0.1": MALFORMED,
    "public.test\\@127.0.0.1": MALFORMED,
    "127.0.0.1\\.public.test": MALFORMED,
    "127.0.0.1#@public.test": FORBIDDEN,
    "127.0.0.1%00.public.test": MALFORMED,
    "127.0.0.1\t": MALFORMED,
    "127.0.0.1\r\nHost: public.test": MALFORMED,
    "private.test": FORBIDDEN,
    "private-v6.test": FORBIDDEN,
    "mapped.test": FORBIDDEN,
    "mixed.test": FORBIDDEN,
    "mixed-v6.test": FORBIDDEN,
}
REDIRECTS = {
    "address": FORBIDDEN,
    "name": FORBIDDEN,
    "v6": FORBIDDEN,
    "scheme-relative": FORBIDDEN,
    "userinfo": MALFORMED,
    "backslash": MALFORMED,
    "file": MALFORMED,
    "data": MALFORMED,
    "loop": FETCH_FAILED,
}
FILES = {
    "file:///etc/passwd": MALFORMED,
    "FILE:///etc/passwd": MALFORMED,
    "file://localhost/etc/passwd": MALFORMED,
    "file:/etc/passwd": MALFORMED,
    "file:///%65tc/passwd": MALFORMED,
    "/etc/passwd": MALFORMED,
    "../../etc/passwd": MALFORMED,
    "//127.0.0.1/etc/passwd": MALFORMED,
    "gopher://127.0.0.1:{port}/": MALFORMED,
    "ftp://127.0.0.1:{port}/": MALFORMED,
    "concat:/etc/passwd|/etc/passwd": MALFORMED,
    "subfile,,start,0,end,64,,:/etc/passwd": MALFORMED,
    "unix:///run/redis.sock": MALFORMED,
    "javascript:alert(1)": MALFORMED,
    "http:///etc/passwd": MALFORMED,
    "cid:../../etc/passwd": MALFORMED,
}
SERVERS = {
    "picture.png": ANSWERED,
    "endless": FETCH_FAILED,
    "trickle": FETCH_FAILED,
    "silent": FETCH_FAILED,
    "broken": FETCH_FAILED,
    "huge": FETCH_FAILED,
    "negative": FETCH_FAILED,
    "gzip": FETCH_FAILED,
    "empty": INVALID_MEDIA,
    "page.html": INVALID_MEDIA,
    "missing": FETCH_FAILED,
}


def host_row(host: str, code: str) -> Attack:
    # The port stands behind the host, wherever that ends.
    def make(site: Site) -> Part:
        return url(f"http://{host}:{site.port}{PATH}")

    return attack(f"host {host!r}", make, code)


def redirect_row(name: str, code: str) -> Attack:
    return attack(
        f"redirect to {name}", lambda site: url(f"http://public.test:{site.port}/to-{name}"), code
    )


def file_row(address: str, code: str) -> Attack:
    return attack(address, lambda site: url(address.format(port=site.port)), code)


def server_row(name: str, code: str) -> Attack:
    return attack(
        f"server: {name}", lambda site: url(f"http://public.test:{site.port}/{name}"), code
    )


def secret_file(site: Site) -> Part:
    return url(f"file://{site.secret}")


def markdown(site: Site) -> list[Part]:
    address = f"http://127.0.0.1:{site.port}{PATH}"
    return [text(f"![]({address}) <img src='{address}'> {address} [image]({address})")]


def rebinding(site: Site) -> Part:
    return url(f"http://rebinding.test:{site.port}{PATH}")


def forbidden_row(modality: str) -> Attack:
    return attack(
        f"{modality} by a forbidden URL",
        lambda site: url(f"http://127.0.0.1:{site.port}/", modality),
        FORBIDDEN,
    )


def long_row(num_chars: int) -> Attack:
    def make(site: Site) -> Part:
        return url(f"http://public.test:{site.port}/".ljust(num_chars, "x"))

    return attack(f"a URL of {num_chars} characters", make, TOO_LARGE)


ROWS = [
    *(host_row(host, code) for host, code in HOSTS.items()),
    *(redirect_row(name, code) for name, code in REDIRECTS.items()),
    *(file_row(address, code) for address, code in FILES.items()),
    *(server_row(name, code) for name, code in SERVERS.items()),
    attack("a file of the server", secret_file, MALFORMED),
    attack("a name that rebinds", rebinding, ANSWERED, FORBIDDEN),
    attack("media in the text", markdown, ANSWERED),
    attack(
        "a video by a forbidden URL",
        lambda s: url(f"http://127.0.0.1:{s.port}/", "video"),
        FORBIDDEN,
    ),
    attack(
        "sound by a forbidden URL", lambda s: url(f"http://127.0.0.1:{s.port}/", "audio"), FORBIDDEN
    ),
    attack("a long URL", lambda s: url(f"http://public.test:{s.port}/" + "x" * 8192), TOO_LARGE),
    attack(
        "a URL of 4 MB", lambda s: url(f"http://public.test:{s.port}/" + "x" * (4 << 20)), TOO_LARGE
    ),
]
