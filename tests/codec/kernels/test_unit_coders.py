"""Batches of units: host threads, and the nvCOMP path over a stand-in for nvCOMP."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch

from kvtc_vllm.codec.container import (
    Header,
    NewSection,
    SectionKind,
    build,
    parse,
)
from kvtc_vllm.codec.entropy import DEFLATE, RAW, EncodedSection, Unit, aligned
from kvtc_vllm.codec.entropy.unit_table import checked_table
from kvtc_vllm.codec.kernels import deflate_nvcomp
from kvtc_vllm.codec.streams import DeviceThread
from tests.codec.kernels import fake_nvcomp

from kvtc_vllm.codec.kernels.unit_coders import (  # isort: skip
    HostUnitCoder,
    NvcompUnitCoder,
    PlacedSections,
    unit_coder,
)
from kvtc_vllm.codec.kernels.deflate_nvcomp import size_classes  # isort: skip
from kvtc_vllm.codec.kernels.nvcomp_library import NvcompLibrary  # isort: skip
from kvtc_vllm.codec.kernels.uploads import UploadedBlobs  # isort: skip
from kvtc_vllm.codec.kernels.verified import VerifiedBlob  # isort: skip

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the real nvCOMP is tested here")
CPU = torch.device("cpu")
LENGTHS = [1, 7, 4000, 65536, 300, 65536, 9]


@pytest.fixture(params=["threads", "nvcomp"])
def coder(request):
    if request.param == "threads":
        return HostUnitCoder(CPU)
    return NvcompUnitCoder(deflate_nvcomp.NvcompDeflate(fake_nvcomp.library()))


def payload(seed: int) -> bytes:
    drawn = random.Random(seed)
    return b"".join(
        drawn.randbytes(length) if index % 2 else bytes(drawn.choices(range(9), k=length))
        for index, length in enumerate(LENGTHS)
    )


def blob(sections: list[NewSection]) -> bytes:
    return build(Header(1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 8.0, bytes(16), bytes(16)), sections)


def opened(coder, blobs):
    """A reader of verified blobs, as a load makes it."""
    uploads = UploadedBlobs([memoryview(b) for b in blobs], DeviceThread(CPU, 0), CPU, True)
    for index in range(len(blobs)):
        uploads.stage(index)
    uploads.send(slice(0, len(blobs)))
    verified = {index: VerifiedBlob.of(b, parse(b)) for index, b in enumerate(blobs)}
    return coder.open(uploads, verified)


def placed(*sections):
    """Blob, number and place of each section."""
    return PlacedSections(*np.array(sections, np.int64).reshape(-1, 3).T)


def packed(raw, *lengths):
    """Raw bytes as a tensor, with starts and lengths of units that tile them."""
    sizes = np.array(lengths, np.int64)
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return data, sizes.cumsum() - sizes, sizes


@pytest.mark.parametrize("backwards", [False, True])
def test_units_written_in_a_batch_are_read_by_isal(coder, backwards):
    raw = payload(1)
    coded = coder.deflate(*packed(raw, *LENGTHS))
    stored = coded.stored.tolist()
    order = list(reversed(range(len(stored)))) if backwards else list(range(len(stored)))
    places, end = np.zeros(len(stored), np.int64), 8
    for index in order:
        places[index] = end
        end += aligned(stored[index])
    body = coded.collect(places, end).cpu().numpy().tobytes()
    assert body[:8] == bytes(8)
    units = [Unit(LENGTHS[i], stored[i]) for i in order]
    starts = packed(raw, *LENGTHS)[1]
    wanted = b"".join(raw[starts[i] : starts[i] + LENGTHS[i]] for i in order)
    assert DEFLATE.decode(units, memoryview(body)[8:], len(raw)) == wanted
    assert stored[0] == 1
    assert stored[3] == 65536
    assert stored[2] < 4000


def test_sections_of_several_blobs_are_read_in_any_order(coder):
    sizes = (5000, 70001, 3, 900)
    raws = [[payload(10 * b + s)[:size] for s, size in enumerate(sizes)] for b in range(3)]
    blobs = []
    for parts in raws:
        sections = [
            NewSection(SectionKind.CODED_K, each.coder_id, 0, len(raw), each.encode([raw]))
            for raw, each in zip(parts, (DEFLATE, RAW, RAW, DEFLATE), strict=True)
        ]
        blobs.append(blob(sections))
    order = [(2, 1), (0, 3), (1, 0), (0, 2), (2, 3), (1, 1)]
    expected = b"".join(raws[b][s] for b, s in order)
    wanted, end = [], 3
    for b, section in order:
        wanted.append((b, section, end))
        end += len(raws[b][section]) + 5
    out = torch.zeros(end, dtype=torch.uint8)
    reader = opened(coder, blobs)
    assert reader.inflate(placed(*wanted), out) == {}
    assert reader.damaged() == {}
    data = out.numpy().tobytes()
    found = [data[place:][: len(raws[b][section])] for b, section, place in wanted]
    assert b"".join(found) == expected


def test_a_section_that_does_not_fit_its_units_fails_alone(coder):
    raws = [payload(seed)[:9000] for seed in range(3)]
    blobs = []
    for index, raw in enumerate(raws):
        length = len(raw) + (index == 1)
        section = NewSection(SectionKind.CODED_K, 1, 0, length, DEFLATE.encode([raw]))
        blobs.append(blob([section]))
    sections = placed((0, 0, 0), (1, 0, 9000), (2, 0, 18001))
    out = torch.zeros(27001, dtype=torch.uint8)
    damaged = opened(coder, blobs).inflate(sections, out)
    assert list(damaged) == [1]
    assert damaged[1].reason == "entropy"
    data = out.numpy().tobytes()
    assert data[:9000] == raws[0]
    assert data[18001:] == raws[2]


def test_nothing_is_read_from_no_sections(coder):
    assert opened(coder, []).inflate(placed(), torch.empty(0, dtype=torch.uint8)) == {}
    none = np.empty(0, np.int64)
    coded = coder.deflate(torch.empty(0, dtype=torch.uint8), none, none)
    assert (len(coded.stored), len(coded.collect(none, 0))) == (0, 0)


def test_a_cpu_gets_host_threads():
    assert isinstance(unit_coder(CPU), HostUnitCoder)


@pytest.fixture
def nvcomp():
    """Our side of nvCOMP, over the stand-in."""
    return deflate_nvcomp.NvcompDeflate(fake_nvcomp.library())


def test_a_load_inflates_while_a_store_waits_for_the_device(nvcomp, monkeypatch):
    """No lock keeps other threads waiting for the encoder's kernels."""
    raw = payload(1)[:9000]
    section = DEFLATE.encode([raw])
    table = checked_table(section.units, memoryview(section.body), len(raw))
    body = torch.frombuffer(bytearray(section.body), dtype=torch.uint8)
    out = torch.empty(len(raw), dtype=torch.uint8)
    loaded = threading.Event()

    def load():
        nvcomp.decompress(body, table, out)
        loaded.set()

    def begin_loading(device):
        threading.Thread(target=load).start()
        assert loaded.wait(30), "the load waits for the store"

    monkeypatch.setattr(deflate_nvcomp, "synchronize", begin_loading)
    units = nvcomp.compress(*packed(raw, 5000, 4000))
    assert out.numpy().tobytes() == raw
    assert (units.stored < 5000).all()


def test_a_unit_that_nvcomp_cannot_decode_is_told_with_its_blob(coder):
    """As a writer may leave it that computed the checksum over it."""
    if isinstance(coder, HostUnitCoder):
        pytest.skip("isal reports as it decodes")
    raws = [payload(seed)[8:9000] for seed in range(3)]
    encoded = [DEFLATE.encode([raw]) for raw in raws]
    broken = bytearray(encoded[1].body)
    broken[:3] = b"\xff\xff\xff"
    encoded[1] = EncodedSection(encoded[1].units, bytes(broken))
    blobs = [
        blob([NewSection(SectionKind.CODED_K, 1, 0, len(raw), section)])
        for raw, section in zip(raws, encoded, strict=True)
    ]
    out = torch.zeros(27000, dtype=torch.uint8)
    reader = opened(coder, blobs)
    assert reader.inflate(placed((0, 0, 0), (1, 0, 9000), (2, 0, 18000)), out) == {}
    damaged = reader.damaged()
    assert list(damaged) == [1]
    assert damaged[1].reason == "entropy"
    data = out.numpy().tobytes()
    assert data[: len(raws[0])] == raws[0]
    assert data[18000 : 18000 + len(raws[2])] == raws[2]


def test_scratch_is_as_large_as_units_of_their_size_can_become(nvcomp):
    """Most units are far smaller than the largest."""
    lengths = [65536, *[2816] * 100]
    units = nvcomp.compress(*packed(bytes(sum(lengths)), *lengths))
    scratch = units.kept[1].numel()
    assert scratch <= sum(map(fake_nvcomp.worst, lengths)) + 16 * len(lengths)


def test_units_of_about_one_size_are_one_batch():
    sizes = np.array([65536, 40000, 32769, 32768, 20000, 5000, 5000, 3000, 2500, 1, 1])
    parts = [sizes[part].tolist() for part in size_classes(sizes)]
    assert parts == [[65536, 40000, 32769], [32768, 20000], [5000, 5000, 3000], [2500], [1, 1]]


def test_what_the_library_refuses_is_an_error():
    library = fake_nvcomp.FakeLibrary()
    library.nvcompBatchedDeflateCompressGetMaxOutputChunkSize = Refusing()
    with pytest.raises(RuntimeError, match="GetMaxOutputChunkSize gave status 10"):
        deflate_nvcomp.NvcompDeflate(NvcompLibrary(library)).compress(*packed(bytes(8), 8))


class Refusing:
    """A C function that refuses its arguments."""

    def __call__(self, *arguments):
        return 10
