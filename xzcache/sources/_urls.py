"""URLs and chains of URLs: parse them, show them without credentials, and reject ambiguous ones.

A password may contain any character. So a URL is shown only as far as no character can belong to a credential. A URL
whose host cannot be distinguished from a password is rejected before any library reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from ipaddress import IPv6Address
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

_BUCKETS: Final = ("s3", "s3a", "gs", "gcs", "oss", "oci", "b2", "r2", "cos", "cosn", "obs", "tos", "swift")
"""Schemes whose host is a bucket and that have no user."""
_CONTAINERS: Final = ("az", "abfs", "abfss", "adl", "wasb", "wasbs")
"""Schemes of the form ``container@host``."""
_WEB: Final = ("http", "https")
_PATHS: Final = ("file", "local", "memory", "zip", "tar", "libarchive")
"""Schemes without a host."""

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_BRACKETS: Final = re.compile(r"(?<=[/@])\[[0-9A-Fa-f:.]+(%25[\w.~-]+)?\]")
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+(%25[\w.~-]+)?\]|[\w.~*?+!$-]*)(:[0-9]{0,5})?")
_BUCKET: Final = re.compile(r"[\w.*?\[\]-]+|arn:aws[\w-]*:[\w:-]+", re.ASCII)
_WITHIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*(?:::[A-Za-z0-9+.\-]+)*://[^\s'\"<>]+")
_USER: Final = re.compile(r"://[^/?#]*@")
_SECRET: Final = re.compile(
    r"(^|[^a-z])(keys?|api_?keys?|pass|sas|sig|auth|sessions?|certs?|cookies?|headers?)($|[^a-z])"
    r"|secret|token|passw|passphrase|credential|authoriz|signature|certificate"
)
_HUMP: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class Link(NamedTuple):
    """One URL of a chain."""

    text: str
    """As it was given."""
    scheme: str
    """In small letters; empty for a link that is a path or the bare name of a protocol."""
    user: str
    """The text before the host, including the password."""
    host: str
    """With its port."""
    rest: str
    """Path, query and fragment."""
    certain: bool
    """Whether the text can be parsed in one way only."""

    @property
    def shown(self) -> str:
        """For people: without users, passwords, queries and fragments, and without a path that may hold any of them."""
        if not self.certain:
            return f"{self.scheme}://" if self.scheme else "a URL"
        if not self.scheme:
            return _shown_path(self.rest)
        user = f"{self.user}@" if self.user and self.scheme in _CONTAINERS else ""
        return f"{self.scheme}://{user}{self.host}{_shown_path(self.rest)}"


def links(url: str) -> list[Link]:
    """The links of a chain, outermost first; the double colon of an IPv6 address does not separate links."""
    masked, found, start = _BRACKETS.sub(lambda address: "x" * len(address[0]), url), [], 0
    for part in masked.split("::"):
        found.append(_link(url[start : start + len(part)]))
        start += len(part) + 2
    return found


def _link(text: str) -> Link:
    if (match := _SCHEME.match(text)) is None:
        # the name of a protocol, or a path, in which no user and password may stand
        certain = "://" not in text and (text.startswith((".", "/", "~")) or ":" not in text)
        return Link(text, "", "", "", text, certain)
    scheme, after = match[1].lower(), text[match.end() :]
    if scheme in _PATHS:
        return Link(text, scheme, "", "", after, certain=True)
    authority = re.split(r"[/?#]", after, maxsplit=1)[0]
    rest = after[len(authority) :]
    user, _, host = authority.rpartition("@")
    pattern = _BUCKET if scheme in _BUCKETS and not user else _HOST
    certain = (pattern.fullmatch(host) is not None or not host) and not re.search(r"[\s\\\x00-\x1f\x7f]", authority)
    if scheme in _CONTAINERS:
        certain = certain and ":" not in user
    elif user:
        # the password may continue after the apparent host
        certain = certain and "@" not in rest
    elif scheme in (*_WEB, *_BUCKETS) and not host:
        certain = False
    return Link(text, scheme, user, host, rest, certain)


def _shown_path(rest: str) -> str:
    kept: list[str] = []
    for segment in re.split(r"[?#]", rest, maxsplit=1)[0].split("/"):
        plain = segment
        # encoded more than once, a credential could still be read from the text
        for _ in range(3):
            plain = unquote(plain)
        if "@" in plain:
            # the text before it may be a user name and a password
            return ""
        if re.search(r"[?#]", plain) or any(map(sounds_secret, re.findall(r"([^=;&]*)=", plain))):
            break
        kept.append(segment)
    return "/".join(kept)


def shown(url: str) -> str:
    """A URL, a chain of them or a path for people, without credentials."""
    return "::".join(link.shown for link in links(url))


def shown_within(text: str) -> str:
    """A text in which there may be URLs, as `shown` has them."""
    return _WITHIN.sub(lambda url: _shown_in_text(url[0]), text)


def _shown_in_text(url: str) -> str:
    # punctuation after a URL in a sentence
    ends = re.search(r"[),.;\]}>]*$", url)
    cut = ends.start() if ends else len(url)
    return shown(url[:cut]) + url[cut:]


def scrub(error: BaseException, *given: str) -> BaseException:
    """The exception if no text of it and its causes shows a credential; else a substitute. `given` are URLs."""

    def clean(text: str) -> str:
        for url in given:
            text = text.replace(url, shown(url)) if url else text
        return shown_within(text)

    seen: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in seen:
        seen.append(each)
        cleaned = tuple(clean(part) if isinstance(part, str) else part for part in each.args)
        if cleaned != each.args:
            each.args = cleaned
        for name in ("filename", "filename2"):
            if isinstance(path := getattr(each, name, None), str) and clean(path) != path:
                setattr(each, name, clean(path))
        each = each.__cause__ or each.__context__
    if all(clean(text := str(each)) == text for each in seen):
        return error
    # its text was made from parts that are not in `args`, so it cannot be cleaned in place
    substitute = OSError(f"{type(error).__name__}: {clean(str(error))}")
    substitute.__suppress_context__ = True
    return substitute


def without_user(url: str) -> str:
    """A URL or chain without user names and passwords, for identities."""
    return _USER.sub("://", url)


def certain(value: str, parameter: str) -> str:
    """Return a URL or chain unchanged if it is unambiguous and no bucket has a password; else raise `ValueError`.

    The message names the parameter, and of the URL only its scheme and host.
    """
    for link in links(value):
        if link.certain and not (link.user and link.scheme in _BUCKETS):
            continue
        if not link.certain:
            raise ValueError(
                f"{parameter} is a URL that cannot be parsed for certain{_place(link)}: its host could be part of a "
                "password. Give users, passwords and keys as storage_options, and other signs percent-encoded"
            )
        raise ValueError(
            f"{parameter} is a {link.scheme} URL with a user or a password{_place(link)}: give them as storage_options"
        )
    return value


def _place(link: Link) -> str:
    """Scheme and host of a rejected URL, if the host is certain."""
    if not link.scheme:
        return ""
    host = re.split("[/?#]", link.text.partition("@")[2], maxsplit=1)[0]
    clear = link.text.count("@") == 1 and not re.search("[?#]", link.text) and _HOST.fullmatch(host)
    return f" ({link.scheme}://{host if clear else '...'})"


def check_options(options: Mapping[Any, Any]) -> None:
    """Reject URLs among the options as `certain` does; the message names the option."""
    for name, value in options.items():
        for text in _texts({name: value}):
            if _SCHEME.match(text) or ("::" in text and "://" in text):
                certain(text, f"storage_options[{shown_within(str(name))!r}]")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping) and "refs" not in value:
        # references are data
        for name, item in value.items():
            if not sounds_secret(str(name)):
                yield from _texts(item)
    elif isinstance(value, list | tuple) and len(value) < 100:
        # long lists are data, and are not searched
        for item in value:
            yield from _texts(item)


def plain(url: str) -> str:
    """A URL for the libraries: lower-case schemes, and no fragment, which no web server gets."""
    return "::".join(_spelled(link) for link in links(url))


def _spelled(link: Link) -> str:
    if not link.scheme:
        return link.text
    text = link.scheme + link.text[len(link.scheme) :]
    return text.partition("#")[0] if link.scheme in _WEB else text


def without_colons(url: str) -> str:
    """A URL with long IPv6 addresses, because fsspec takes a double colon for the end of a link."""
    return _BRACKETS.sub(lambda address: _long(address[0]), url)


def _long(address: str) -> str:
    try:
        return f"[{IPv6Address(address[1:-1]).exploded}]"
    except ValueError:
        return address


def host_and_port(endpoint: str) -> tuple[str, int, str] | None:
    """Host in small letters, port and path of an address with or without its scheme; None if that is uncertain."""
    link = _link(endpoint if "://" in endpoint else f"https://{endpoint}")
    if not link.certain:
        return None
    match = _HOST.fullmatch(link.host)
    host, port = (match[1], (match[3] or "").lstrip(":")) if match else ("", "")
    path = re.split("[?#]", link.rest, maxsplit=1)[0].rstrip("/")
    return host.lower(), int(port or {"https": 443, "http": 80}.get(link.scheme, 0)), path


def sounds_secret(name: str) -> bool:
    """Whether the name of an option is one of a credential."""
    return _SECRET.search(_HUMP.sub("_", name).lower()) is not None
