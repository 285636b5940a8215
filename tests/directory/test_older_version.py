"""Directories of version 0.1.0, as one was recorded, and processes of it that run beside those of today."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import blake2b
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from processes import META, Gate, Source, Team, audit, run
from servers import needs_obstore, web_server
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore

import xzcache

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stamps are extended attributes")

STAMP = "user.xzcache"
PROTOTYPE = default_buffer_prototype()
SIZE = 200
END = -1

# What 0.1.0 left when it had read four objects whole, a part of the fourth, and the end of the fifth from a source that
# took no notice of ranges: paths, sizes and stamps.
RECORDED = {
    "source/a/c/0": (
        200,
        "02c267cd6a59eb23bec25ac1aac0d04b198dda0689c8000000000000000000000000000000ffffffffffffffff00",
    ),
    "source/a/c/1": (
        200,
        "02127919baf47b4b3d7c6880b7262b87028aea0192c8000000000000000000000000000000ffffffffffffffff00",
    ),
    "source/a/c/2": (
        200,
        "02282e7053146f85f4df442c4508d919a0d828a767c8000000000000000000000000000000ffffffffffffffff00",
    ),
    f"{META}/ranges/83/83e2fe7fb08338d00580760bd82676e9/50_150": (
        100,
        "02d43b9b06290bc7be85578a0760d0c413ab76a5e8640000000000000032000000000000009600000000000000"
        "736f757263652f612f632f3300",
    ),
    f"{META}/ranges/2f/2f3c69e6739c1ad0abe5df9a96e9f9e4/-50_-1": (
        200,
        "0256f44afaf05b071f50bb0dc382b1502ed648a951c800000000000000ceffffffffffffffffffffffffffffff"
        "736f757263652f612f632f3400",
    ),
    "source/a/c/a:b": (
        200,
        "026571ed6ddb31a7aec9adb7077a8bdaa43a4caed2c8000000000000000000000000000000ffffffffffffffff00",
    ),
}
OF_PATHS = dict(zip(RECORDED, ["0", "1", "2", "3", "4", "a:b"], strict=True))
WHOLE = ("0", "1", "2", "a:b")
GENERATION = 74938552321725
INDEX = (
    b"c-rmVZ)h8390%~bOLDoiYp&g_w^6}I$5=z-X16&-"
    b"so1TzEi5Kmmr~1wk|t*sx8AL}tFwwiHW3vC|A68PU&;_c!M#>g7>J;VFGPK%Z~TXfFGLYv%;(QtlWQ(@15p;gAKJUz^W1aK@A=)oUJ~cAqxr"
    b"gLk^7v+V%a0Rr9nwiq`L@_BuSyao1~Uu`WtUsme(vtQKTIec_6(cZB~v;`m!ERuMAvB=lg#cc%uJ&|6Je0eVNo#sqNZ(+OFi+$%oXH#7g|>x"
    b"EedFd_^0;)vT#(PLAAQXw6x#QLojk#wn}pTJtr>a-B1_)!096PL@nkn$8_OXik$>Etxz}q6JfC-lX-"
    b"#0^zHZedfVjfy^A4Vy!&KE1x3A%#vtFCj9wLq?n)D!C&7&%)(UjdLucq-O$eVhk~e_DBHF5;_z4SL-9K;9`Jh!$J9suE~+t7FlTpkiBP^)q-"
    b"n;Fu)0#WYdjJB)tc~HwH;~VRo&7gDkuE82*RyD<i`*jPL6DC+f|~MinF+05WL!tB3C$OPM5AQ3Xzsp6!%}lGjVRaABAOmjTJst{%TDSt=f)E"
    b"@T%@R$EFe3Gza5ZvasUO_7ncRm6j}Vtwx=$KM}kbBjb0pHfFn*yCpJv$ecDwy-Mp?neB?fKC+3Y{M_NtV0livk2X5xmo?n6&LCU)j~s56c=g"
    b"IjTEu7TjDOutw~wEd1>=8oW704T`P^}@yl~3m(elZrVBnMc^8P4BX}^wb(GizSmWw0Pxw|K)=g47mj_f~V?ms-"
    b"rYA48eCQG9U)+!WBq%f1u2cdPAixaY=oc1P;&(0Q$<p<~ap!}-UymhY1leV^)9-{{)XYwU-bH*A<8e6u=&24=A<ps9a#dKpR1EOs7q_sjy<~"
    b"^nM!PC(?o>e7u_55lV88VwI9V*V0$aHZwH&q-|jjbcHQ@5+ugJ&9bkDa-"
    b"6WB$t_zpq?j%DjiP)wAQuUmRVqY^&^@$P!wfX>QPy#>j}=ba>$YI{s`h6nfB}?)!*c$2TX&)V8ZcR}uLX7u>bwnQA&|3=hlAF&>R;SvLFCLv"
    b"gT@(W+BfUZk0f$fE0&>EA&6^2L4KvREDvy@;J<J5~Oh4)wxHMo+WgJA0_s>CMDjw~OX=8~6!v*5G~c;qu8qs25(uPKfBFlF6A;F;}2X?ludh"
    b"Zijg5F!awKvD%#z^tjBD(`}nx4faUCYK)D^b0W=4r|4ge^RBhDY}u8yiyOkp4_A)b<wYw?mom-cec}o*%(ux;IX>wRwdX~bKj4UCitgTq7jZ"
    b"<no^v|#?02fwsMXuf`@cUf^C{K1-jJ90c_%L3bhG?LU+A1$ty{g4vvWP;Up84ey|7Jcs&RuM&$Vr>QMOO=SE-"
    b"22vC7u=*iz=)h|1IbxJWmz;ge)2-"
    b"J(U;bZ6O>zcUH{de$qAN<`_hYej8?XCt!9$bH8y>PuICMbDC2`Sg1A?Cx2}9i1`R4)zly@{!48lBzLb$P(Yd{wY&l_QYj-UhLFyKGT}l#*@a"
    b"-P;jBJUE58BFGTLT`;VS~Vqb}1+6HK^JG$t*XxklaYeF?{9qKj)+npb`U6no<X#D9wi;3GvjgNv}fEu<{^=I+Wc>KaE`75C7T{-"
    b"Gf?<oAlXio4*Y9}1m<C9n@3SPu-!;xu?JUF5ciA+<IMUUbZdV-Fx$|p*wM_$B69olxs9rUu#nW)S90NWRXcvuAh000000O)0S{s#a600000!"
    b"1F%<00000008vH^S`YBBGDfJ00000008I_X*nTnkrmfjZd5Eap6}z&|G!D}2LJ#700000dP*v`B_-YhV4wf1>9-"
    b"{PL;ZREUj4@O_jCaO000000N_7&i>gbhZL+K>aaB#xxp<J>S>9RMx##0c(g#OhJM`J+AI*o~ym-"
    b"?~!CX~uP4H%lCMP<Y?cOE5Se2yjUVY$o*5J9=+aCw>MB=tMZJ5z$f1M4>w=d8RCF#>Q^0%`V&(44GXE2Y)_rzG2T4bcVXuI0^(a-"
    b"tX$KLrPn8#v!m7rB;f8)Hj=j9)s;_L7I<c(miD0}4gcBxc*yPJ8tC)F>X;p-"
    b"bO><;Ga^M6%;OwxbSztAu0FYAx#Z{ipO00000008*sU6a@*%X0W_40V_mD)O2)DH6kpj22pzy#o>7l-L$7-"
    b"E}F}Q8s=_*~rRLq4x#E^Zx}&|5g81|5E=*f0r%*00000006*$Z9`0zSHIT~Eb#9t1PlD@2dfM0TLr5N?5hI(F*Vix`9J>se*gdg0001h-"
    b"iH7G9{>OV0002M|Ks^z(Z7-O-"
    b"{=GY00000006FHX(eVPsw;K7ChdLwm4Wv)IcB7sGq%+TKL6K$N0tBp000000D4b~Px0UX0{{R30002=K0N;e00000008tp{QG|Z00000006x"
    b"YpZ@~@000000O0u_0000000024e(d}Ivi`F~e*gdg00000peGE<DM?l|O_60ap5H#Gs(%6UU+oV"
)


def value(name: str) -> bytes:
    return (bytes([65 + int(name)]) if name.isdecimal() else b"o") * SIZE


def make_source(path: Path) -> None:
    (path / "source/a/c").mkdir(parents=True)
    for name in OF_PATHS.values():
        (path / "source/a/c" / name).write_bytes(value(name))


def recorded(path: Path) -> Path:
    """The directory as it was left."""
    cache = path / "cache"
    cache.mkdir(0o700)
    for relative, (size, stamp) in RECORDED.items():
        file = cache / relative
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(value(OF_PATHS[relative])[:size])
        file.chmod(0o600)
        os.setxattr(file, STAMP, bytes.fromhex(stamp))
    meta = cache / META
    for name in ("tmp", "trash", "odd"):
        (meta / name).mkdir(0o700)
    for name in ("storing", "door", "owners", *(f"keys-{number}" for number in range(16))):
        (meta / f"{name}.lock").touch(0o600)
    # which index is the current one, and how far it had got
    (meta / "guard.lock").write_bytes(struct.pack("<QQ", GENERATION, 6))
    (meta / "format").write_text("1")
    (meta / "max_size").write_text("10000")
    with open(meta / "writes", "wb") as file:
        file.truncate((1 << 20) * 8 + 16)
    (meta / f"index-{GENERATION}.db").write_bytes(zlib.decompress(base64.b85decode(INDEX)))
    return cache


@contextmanager
def in_use(cache: Path) -> Iterator[None]:
    """What is to be seen of a process of 0.1.0 that uses a directory: it has its byte of a file locked."""
    fd = os.open(cache / META / "owners.lock", os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 17, 1, 0))
        yield
    finally:
        os.close(fd)


def opened(path: Path, **options: Any) -> xzcache.CacheStore:
    source = LocalStore(path / "source", read_only=True)
    return xzcache.CacheStore(source, cache_store=path / "cache", namespace="source", revalidate=False, **options)


def get(store: xzcache.CacheStore, name: str, part: Any = None) -> bytes | None:
    found = asyncio.run(store.get(f"a/c/{name}", PROTOTYPE, part))
    return None if found is None else found.to_bytes()


def check_pieces(store: xzcache.CacheStore) -> None:
    assert get(store, "3", RangeByteRequest(50, 150)) == value("3")[:100]
    assert get(store, "3", RangeByteRequest(100, 160)) == value("3")[:60]
    assert get(store, "4", SuffixByteRequest(50)) == value("4")[:50]
    assert get(store, "4", SuffixByteRequest(30)) == value("4")[:30]
    assert get(store, "4") == value("4")


def test_whole_objects_are_taken_over_and_pieces_are_not(tmp_path: Path) -> None:
    recorded(tmp_path)
    (tmp_path / "source").mkdir()
    store = opened(tmp_path)
    assert [get(store, name) for name in WHOLE] == [value(name) for name in WHOLE]
    assert store.cache_info()["cached_keys"] == 4
    assert store.cache_info()["total_size"] == 4 * SIZE
    shutil.rmtree(tmp_path / "source")
    make_source(tmp_path)
    check_pieces(store)
    del store
    xzcache.cleanup_resources()
    audit(str(tmp_path / "cache"))


def test_a_directory_without_an_index_is_taken_over(tmp_path: Path) -> None:
    (next((recorded(tmp_path) / META).glob("index-*.db"))).unlink()
    make_source(tmp_path)
    store = opened(tmp_path)
    assert [get(store, name) for name in WHOLE] == [value(name) for name in WHOLE]
    check_pieces(store)
    del store
    xzcache.cleanup_resources()
    audit(str(tmp_path / "cache"))


def later(link: Connection, path: Path) -> None:
    with closing(opened(path)) as store:
        check_pieces(store)


def test_pieces_of_a_process_that_runs_are_not_read(tmp_path: Path) -> None:
    cache = recorded(tmp_path)
    make_source(tmp_path)
    with in_use(cache):
        store = opened(tmp_path)
        assert [get(store, name) for name in WHOLE] == [value(name) for name in WHOLE]
        check_pieces(store)
        assert all((cache / "source/a/c" / name).read_bytes() == value(name) for name in WHOLE)
        del store
        xzcache.cleanup_resources()
    run(later, tmp_path)
    audit(str(cache))


# -- a process of 0.1.0 that writes to a directory of today


class NobodyCanTell(Exception):
    """What 0.1.0 answers to a file whose stamp it does not know: the file stays, and others go on reading it."""


def unlink_as_of_old(cache: Path, relative: str, key: str) -> None:
    """As 0.1.0 makes an entry invisible where there is no guard for it: if it can tell that it is an entry."""
    path = cache / relative
    if not path.exists():
        return
    raw = os.getxattr(path, STAMP)
    version, digest, *_ = struct.unpack_from("<B16sIQqq", raw)
    raw[struct.calcsize("<B16sIQqq") :].decode()
    if version not in (1, 2) or digest != blake2b(f"{key}\0{0}\0{END}".encode(), digest_size=16).digest():
        raise NobodyCanTell(relative)
    path.unlink()


def write_as_of_old(path: Path, name: str, data: bytes) -> None:
    """As 0.1.0 writes a key through a directory in which it finds a directory instead of its guard."""
    key = f"source/a/c/{name}"
    for turn in range(2):
        with open(path / "cache" / META / "writes", "r+b") as file:
            slot = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little") % (1 << 20)
            for position in (slot, 1 << 20):
                count = int.from_bytes(os.pread(file.fileno(), 8, 8 * position), "little") + 1
                os.pwrite(file.fileno(), count.to_bytes(8, "little"), 8 * position)
        unlink_as_of_old(path / "cache", key, key)
        hashed = blake2b(f"{key}\0{0}\0{END}".encode(), digest_size=16).hexdigest()
        for odd in (path / "cache" / META / "odd").glob(f"**/{hashed}"):
            unlink_as_of_old(path / "cache", str(odd.relative_to(path / "cache")), key)
        shutil.rmtree(path / "cache" / META / "ranges" / hashed[:2] / hashed, ignore_errors=True)
        if turn == 0:
            (path / "source/a/c" / name).write_bytes(data)


def told(link: Connection, path: Path, name: str) -> bytes | None:
    with closing(opened(path)) as store:
        return get(store, name)


def test_what_it_writes_is_not_stale(tmp_path: Path) -> None:
    make_source(tmp_path)
    store = opened(tmp_path)
    assert get(store, "0") == value("0")
    assert get(store, "1", RangeByteRequest(50, 60)) == value("1")[:10]
    assert store.cache_info()["cached_keys"] == 2
    write_as_of_old(tmp_path, "0", b"new" * 100)
    write_as_of_old(tmp_path, "1", b"new" * 100)
    assert get(store, "0") == b"new" * 100
    assert get(store, "1", RangeByteRequest(51, 57)) == b"newnew"
    assert run(told, tmp_path, "0") == run(told, tmp_path, "1") == b"new" * 100
    del store
    xzcache.cleanup_resources()
    audit(str(tmp_path / "cache"))


@needs_obstore
def test_what_it_writes_is_not_stale_where_the_source_tells_states(tmp_path: Path) -> None:
    make_source(tmp_path)
    with web_server(tmp_path / "source") as web:
        store = xzcache.CacheStore(web.url, cache_store=tmp_path / "cache", namespace="source", revalidate=False)
        assert get(store, "0") == get(store, "0") == value("0")
        assert web.chunks() == 1
        write_as_of_old(tmp_path, "0", b"new" * 100)
        assert get(store, "0") == b"new" * 100


def fetch(link: Connection, path: Path, log: str, gate: str) -> bytes | None:
    source = Source(LocalStore(path / "source", read_only=True), log, gate)
    options = {"cache_store": path / "cache", "namespace": "source", "revalidate": False}
    return get(xzcache.CacheStore(source, **options), "0")


def test_what_was_fetched_before_it_wrote_is_not_stored(tmp_path: Path) -> None:
    make_source(tmp_path)
    assert run(told, tmp_path, "1") == value("1")
    gate = Gate(tmp_path / "gate")
    with closing(gate), Team() as team:
        child = team.start(fetch, tmp_path, str(tmp_path / "log"), gate.path)
        gate.arrival()
        write_as_of_old(tmp_path, "0", b"new" * 100)
        gate.open()
        assert child.result() in (value("0"), b"new" * 100)
    assert run(told, tmp_path, "0") == b"new" * 100
