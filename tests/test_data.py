"""Data: every bad input gives one clear error and leaves nothing behind; converters; known values of the real files where these are at hand."""
import errno
import functools
import gzip
import http.server
import io
import os
import pathlib
import struct
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch

from pcvae import data
from pcvae.data import core, images, synthetic
from pcvae.data.core import DataFile, DataFileCorrupt, DataFileMissing, Dataset


def at_hand(file):
    return any((folder / file.name).is_file() for folder in core.places().values())


needs_omniglot = pytest.mark.skipif(not at_hand(images.OMNIGLOT_NPZ), reason="omniglot28.npz is neither in $PCVAE_DATA nor in the user cache")
needs_mnist = pytest.mark.skipif(not at_hand(images.MNIST_NPZ), reason="mnist28.npz is neither in $PCVAE_DATA nor in the user cache")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty user cache, no $PCVAE_DATA, and no network."
    def offline(url, path):
        raise ConnectionError("no network")
    folder = tmp_path / "cache"
    for module in (core, images):
        monkeypatch.setattr(module, "user_cache", lambda: folder)
    monkeypatch.delenv("PCVAE_DATA", raising=False)
    monkeypatch.setattr(core, "_download", offline)
    return folder


@pytest.fixture
def server(tmp_path, monkeypatch, cache):
    "A web server over a folder: (folder, address). Downloads go through pooch, as for users."
    pytest.importorskip("pooch")
    folder = tmp_path / "www"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            if not self.path.startswith("/cut/"):
                return super().do_GET()
            body = (folder / self.path[5:]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(core, "_download", _real_download)
    yield folder, f"http://127.0.0.1:{httpd.server_address[1]}/"
    httpd.shutdown()
    httpd.server_close()


_real_download = core._download


def files_in(folder):
    return sorted(p.name for p in folder.rglob("*")) if folder.exists() else []


# asking by name

def test_unknown_name_names_the_nearest():
    with pytest.raises(ValueError, match="unknown data set 'omniglott'.*Did you mean 'omniglot'.*Known: .*simplex"):
        data.load("omniglott")
    with pytest.raises(ValueError, match="unknown data set 'gm'"):
        data.fetch("gm")


def test_unknown_parameter_names_the_nearest():
    with pytest.raises(ValueError, match="parameter of data set 'gmm'.*'n_per_componnet'.*'n_per_component'"):
        data.load("gmm", n_per_componnet=5)
    with pytest.raises(TypeError, match="data set 'simplex': k='32' should be int"):
        data.load("simplex", k="32")
    with pytest.raises(ValueError, match="'mnist': 'n_trian'. Did you mean 'n_train'"):
        data.load("mnist", n_trian=28)


@pytest.mark.parametrize("name, params, message", [
    ("gmm", dict(n_per_component=20_001), "n_per_component must be a whole number from 10 to 20000, got 20001"),
    ("gmm", dict(n_per_component=0), "n_per_component .* got 0"),
    ("simplex", dict(k=1), "k must be a whole number of at least 2, got 1"),
    ("simplex", dict(v=0.), "v > 0"),
    ("simplex", dict(seed=-1), "seed must be a whole number"),
    ("linear_gaussian", dict(D=3, d=4), "d must be a whole number from 1 to 3, got 4"),
    ("linear_gaussian", dict(s2=-1.), "s2 > 0, got -1"),
    ("digits", dict(size=14), "digits come in size 8 or 28, got 14"),
    ("digits", dict(binarise="twice"), "binarise must be True .* got 'twice'"),
])
def test_bad_values(name, params, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, **params)


def test_sources_lists_all_and_no_path(cache, tmp_path):
    rows = {row["name"]: row for row in data.sources()}
    assert {"gmm", "simplex", "linear_gaussian", "digits", "omniglot", "mnist"} <= set(rows)
    assert rows["gmm"]["where"] == "built in" and rows["gmm"]["at_hand"]
    assert not rows["mnist"]["at_hand"] and rows["mnist"]["where"] == ""
    assert all(row["about"] and row["origin"] for row in rows.values())
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mnist28.npz").touch()
    row = next(r for r in data.sources(data_dir=tmp_path / "d") if r["name"] == "mnist")
    assert row["at_hand"] and row["where"] == "data_dir"
    assert str(tmp_path) not in repr(data.sources(data_dir=tmp_path / "d"))


# files that are missing or damaged

def test_missing_without_download_is_one_clear_error(cache, tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        data.load("omniglot", data_dir=tmp_path / "nowhere", download=False)
    text = str(e.value)
    assert isinstance(e.value, DataFileMissing) and "\n" not in text
    for part in ("'omniglot'", "omniglot28.npz", "images_background.zip", "data_dir", "no such folder", "$PCVAE_DATA (not set)", "user cache", "download=False", "https://"):
        assert part in text, part
    assert "from_zips" not in text and files_in(cache) == []


def test_missing_without_network_gives_the_reason(cache):
    with pytest.raises(FileNotFoundError, match="'mnist' needs mnist28.npz or train-images.*download failed.*ConnectionError: no network"):
        data.load("mnist")
    assert files_in(cache) == []
    with pytest.raises(FileNotFoundError, match="'mnist' needs"):
        data.fetch("mnist")


def test_missing_names_the_other_source_if_that_is_at_hand(cache, tmp_path):
    (tmp_path / "chardata.mat").write_bytes(b"x")
    with pytest.raises(DataFileMissing, match="chardata.mat is at hand: source='iwae' uses it"):
        data.load("omniglot", data_dir=tmp_path, download=False)


def test_corrupt_file_names_sums_and_remedy(cache, tmp_path, monkeypatch):
    (tmp_path / "omniglot28.npz").write_bytes(b"not it")
    found = core.file_digest(tmp_path / "omniglot28.npz")
    for how in (dict(data_dir=tmp_path), {}):
        if not how:
            monkeypatch.setenv("PCVAE_DATA", str(tmp_path))
        with pytest.raises(DataFileCorrupt) as e:
            data.load("omniglot", **how)
        for part in ("omniglot28.npz", images.OMNIGLOT_NPZ.checksum.split(":")[1], found, "delete", "load again"):
            assert part in str(e.value)


def test_truncated_gzip_and_npz(cache, tmp_path):
    for file in images.MNIST_IDX:
        (tmp_path / file.name).write_bytes(gzip.compress(b"x" * 1000)[:-9])
    with pytest.raises(DataFileCorrupt, match="train-images-idx3-ubyte.gz.*unreadable"):
        data.load("mnist", data_dir=tmp_path)
    core.write_npz(tmp_path / images.OMNIGLOT_CONVERTED.name, train=np.zeros((9, 28, 28), np.uint8))
    whole = (tmp_path / images.OMNIGLOT_CONVERTED.name).read_bytes()
    (tmp_path / images.OMNIGLOT_CONVERTED.name).write_bytes(whole[:-30])
    with pytest.raises(DataFileCorrupt, match="cannot be read"):
        data.load("omniglot", data_dir=tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flip", "pickle"])
def test_read_npz_never_returns_a_damaged_array(tmp_path, damage):
    path = tmp_path / "a.npz"
    core.write_npz(path, x=np.random.RandomState(0).randint(256, size=(100, 28), dtype=np.uint8))
    raw = bytearray(path.read_bytes())
    if damage == "cut":
        del raw[len(raw) // 2:]
    elif damage == "flip":
        raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)
    if damage == "pickle":
        np.savez(path, x=np.array([{}], dtype=object))
    with pytest.raises(DataFileCorrupt, match="a.npz: cannot be read"):
        core.read_npz(path)


@pytest.mark.parametrize("stage", ["savez_compressed", "replace"])
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, stage):
    def full(path, *args, **kwargs):
        if stage == "savez_compressed":
            path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(*((np, "savez_compressed") if stage == "savez_compressed" else (os, "replace")), full)
    with pytest.raises(OSError, match="No space left"):
        core.write_npz(tmp_path / "out" / "a.npz", x=np.ones(3))
    assert files_in(tmp_path / "out") == []


# downloads, over a local web server

def md5_of(path):
    return "md5:" + core.file_digest(path, "md5")


def test_fetch_checks_and_keeps(server, cache):
    www, url = server
    (www / "a.bin").write_bytes(b"hello")
    path = core.fetch_file(DataFile("a.bin", md5_of(www / "a.bin"), (url + "gone/a.bin", url + "a.bin")))   # the first address is dead
    assert path.read_bytes() == b"hello" and files_in(cache) == ["a.bin"]
    assert core.find_file("a.bin", md5_of(www / "a.bin")) == path


@pytest.mark.parametrize("address, reason", [("a.bin", "expected md5 0, found 5d41402abc4b2a76b9719d911017c592"), ("cut/a.bin", "ChunkedEncodingError|IncompleteRead|DataFileCorrupt"),
                                             ("gone.bin", "404")])
def test_bad_download_leaves_nothing(server, cache, address, reason):
    www, url = server
    (www / "a.bin").write_bytes(b"hello")
    with pytest.raises(DataFileMissing, match=reason):
        core.fetch_file(DataFile("a.bin", "md5:0", (url + address,)))
    assert files_in(cache) == []


def test_without_pooch_files_at_hand_still_load(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.delenv("PCVAE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert core.user_cache() == tmp_path / "pcvae"
    (tmp_path / "a.bin").write_bytes(b"hello")
    assert core.obtain("a", ((DataFile("a.bin", "md5:5d41402abc4b2a76b9719d911017c592"),),), tmp_path)[0].name == "a.bin"
    with pytest.raises(DataFileMissing, match="pooch"):
        core.fetch_file(DataFile("b.bin", "", ("http://127.0.0.1:9/b.bin",)))


def test_user_cache_is_poochs():
    assert core.user_cache() == pathlib.Path(pytest.importorskip("pooch").os_cache("pcvae"))


def test_import_is_light():
    code = "import sys, pcvae.data; sys.exit('pooch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# converters: tiny files in the public formats

def tiny_zip(path, alphabet, numbers, seed):
    from PIL import Image
    r = np.random.RandomState(seed)
    with zipfile.ZipFile(path, "w") as z:
        for c in numbers:
            for d in range(1, 21):
                Image.fromarray(r.rand(105, 105) > 0.1).save(buffer := io.BytesIO(), "PNG")
                z.writestr(f"images_x/{alphabet}/character{c:02d}/{c:04d}_{d:02d}.png", buffer.getvalue())
        z.writestr("images_x/readme.txt", "no picture")


@pytest.fixture
def tiny_omniglot(server, monkeypatch):
    www, url = server
    tiny_zip(www / "images_background.zip", "Greek", [1, 3], 0)
    tiny_zip(www / "images_evaluation.zip", "Angelic", [2], 1)
    files = tuple(DataFile(n, md5_of(www / n), (url + n,)) for n in ("images_background.zip", "images_evaluation.zip"))
    monkeypatch.setattr(images, "OMNIGLOT_ZIPS", files)
    return www


def test_omniglot_from_zips_end_to_end(tiny_omniglot, cache, monkeypatch):
    d = data.load("omniglot", n_valid=5, binarise=False)
    assert [len(x) for x in (d.train, d.valid, d.test)] == [40, 5, 15] and d.shape == (1, 28, 28)
    assert "not bit for bit" in d.info["pixels"]
    assert files_in(cache) == ["images_background.zip", "images_evaluation.zip", "omniglot28_from_zips.npz"]
    raw = core.read_npz(cache / "omniglot28_from_zips.npz")
    assert raw["train_char"].tolist() == [1] * 15 + [2] * 15 + [3] * 15 and raw["test_drawer"].tolist() == [16, 17, 18, 19, 20] * 3
    assert raw["alphabet_names"].tolist() == ["Greek", "Angelic"] and raw["test_labels"].tolist() == [0] * 5 + [1] * 5 + [0] * 5
    monkeypatch.setattr(images, "omniglot_from_zips", None)                 # the second time nothing is converted
    (cache / "images_background.zip").unlink()
    assert torch.equal(data.load("omniglot", n_valid=5, binarise=False, download=False).train, d.train)


def test_omniglot_zip_without_room_in_the_cache(tiny_omniglot, cache, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(images, "write_npz", full)
    assert len(data.load("omniglot", data_dir=tiny_omniglot, n_valid=5).test) == 15
    assert files_in(cache) == []


def test_shrink_keeps_orientation_and_ink():
    page = np.zeros((105, 105))
    page[:52, :26] = 1                                                      # upper half, left quarter
    small = images.shrink(page) / 255
    assert small[3, 3] == 1 and small[3, 20] == 0 and small[24, 3] == 0
    assert abs(small.sum() / 28 ** 2 - page.mean()) < 0.005


def write_mat(path, train, test, train_labels, test_labels):
    from scipy.io import savemat
    columns = lambda x: (x / 255.).transpose(0, 2, 1).reshape(len(x), -1).T
    one_hot = lambda y: np.eye(50)[y].T
    savemat(path, dict(data=columns(train), testdata=columns(test), target=one_hot(train_labels), testtarget=one_hot(test_labels)))


def test_omniglot_from_mat(cache, tmp_path, monkeypatch):
    r = np.random.RandomState(0)
    train, test = (r.randint(256, size=(n, 28, 28), dtype=np.uint8) for n in (40, 12))
    y, yt = r.randint(50, size=40), r.randint(50, size=12)
    write_mat(tmp_path / "chardata.mat", train, test, y, yt)
    with pytest.raises(DataFileCorrupt, match="chardata.mat: damaged or another version: expected git 016a3536"):
        data.load("omniglot", source="iwae", data_dir=tmp_path)
    monkeypatch.setattr(images, "CHARDATA", DataFile("chardata.mat", "git:" + core.file_digest(tmp_path / "chardata.mat", "git")))
    d = data.load("omniglot", source="iwae", data_dir=tmp_path, n_valid=10, binarise=False)
    assert torch.allclose(d.test[:, 0], torch.tensor(test / 255.).float()) and d.labels["test"].tolist() == yt.tolist()
    assert sorted(d.labels["train"].tolist() + d.labels["valid"].tolist()) == sorted(y.tolist()) and d.info["pixels"] == "chardata.mat"


def write_idx(path, a):
    with gzip.open(path, "wb", compresslevel=1) as f:
        f.write(struct.pack(f">HBB{a.ndim}I", 0, 8, a.ndim, *a.shape))
        f.write(a.tobytes())


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x03", struct.pack(">HBB3I", 0, 8, 3, 9, 28, 28) + b"short", struct.pack(">HBBI", 0, 13, 1, 4) + b"1234"])
def test_idx_of_another_kind(tmp_path, content):
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DataFileCorrupt, match="a.gz: cannot be read"):
        images.read_idx(tmp_path / "a.gz")


@needs_mnist
def test_mnist_idx_files_equal_the_npz(tmp_path, monkeypatch):
    "Also proves the npz: the unpacked files have the published md5 sums, or `load` would refuse them."
    raw = core.read_npz(core.find_file("mnist28.npz"))
    reference = data.load("mnist", download=False)
    for file, key in zip(images.MNIST_IDX, ("train", "train_labels", "test", "test_labels")):
        write_idx(tmp_path / file.name, raw[key])
    monkeypatch.setattr(core, "user_cache", lambda: tmp_path / "none")
    monkeypatch.delenv("PCVAE_DATA", raising=False)
    d = data.load("mnist", data_dir=tmp_path, download=False)
    for part in ("train", "valid", "test"):
        assert torch.equal(getattr(d, part), getattr(reference, part)) and torch.equal(d.labels[part], reference.labels[part])


@needs_mnist
def test_mnist_split():
    d = data.load("mnist", download=False)
    assert [len(x) for x in (d.train, d.valid, d.test)] == [50_000, 10_000, 10_000] and d.shape == (1, 28, 28)
    assert d.labels["train"][:5].tolist() == [5, 0, 4, 1, 9] and d.labels["test"][:5].tolist() == [7, 2, 1, 0, 4]
    few = data.load("mnist", download=False, n_train=100, n_test=50)
    assert (len(few.train), len(few.valid), len(few.test)) == (100, 10_000, 50)
    with pytest.raises(ValueError, match="n_train must be a whole number from 1 to 50000, got 60000"):
        data.load("mnist", download=False, n_train=60_000)


# binarisation

def test_fixed_binarisation_same_seed_same_bits():
    a, b = data.load("digits"), data.load("digits")
    assert torch.equal(a.test, b.test) and torch.equal(a.valid, b.valid)
    assert set(a.test.unique().tolist()) == {0., 1.} and "test binarised once with seed 12" in a.info["seeds"]
    p = np.full((2000, 16), 0.3, np.float32)
    assert not np.array_equal(core.bernoulli_once(p, 1), core.bernoulli_once(p, 2))
    assert abs(core.bernoulli_once(p, 1).mean() - 0.3) < 0.01


def test_batches_are_drawn_anew_and_follow_the_generator():
    d, idx = data.load("digits"), torch.tensor([3, 1, 4])
    g = torch.Generator().manual_seed(5)
    one, two = d.batch(idx, g), d.batch(idx, g)
    assert one.shape == (3, 1, 8, 8) and not torch.equal(one, two)
    assert torch.equal(one, d.batch(idx, torch.Generator().manual_seed(5)))
    fixed = data.load("digits", binarise="fixed")
    assert torch.equal(fixed.batch(idx, g), fixed.train[idx])
    assert d.to("cpu", torch.float64).batch(idx, g).dtype == torch.float64


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_dataset_refuses_nan_empty_and_bad_pixels(part):
    ok = torch.ones(4, 1, 8, 8)
    for bad, message in ((torch.full_like(ok, float("nan")), "NaN"), (ok[:0], "is empty"), (255 * ok, r"\[0, 1\]"), (ok.int(), "float tensor")):
        with pytest.raises((ValueError, TypeError), match=f"'d', {part}.*{message}"):
            Dataset("d", **{**dict(train=ok, valid=ok, test=ok), part: bad}, binarise=True)


# known values

def test_gmm_is_the_papers():
    d = data.load("gmm")
    assert [len(x) for x in (d.train, d.valid, d.test)] == [162_001, 18_000, 19_999] and d.stand_in == ""
    norms = np.linalg.norm(d.info["means"], axis=1)
    assert norms.round(2).tolist() == [35.06, 34.15, 3.40, 31.86, 34.41, 16.67, 13.14, 26.56, 29.39, 18.88]
    assert d.info["variances"].round(2).tolist() == [7.16, 5.57, 2.33, 3.15, 4.00, 5.99, 1.37, 7.99, 3.98, 5.09]
    assert round(-synthetic.gmm_log_prob(d.test).mean().item(), 2) == 36.43
    assert abs(((d.test - d.train.mean(0)) ** 2).sum(1).mean() - 698.35) < 0.01
    small = data.load("gmm", n_per_component=100)
    assert len(small.train) + len(small.valid) + len(small.test) == 1000 and "first 100" in small.stand_in
    assert all((d.train == x).all(1).any() or (d.test == x).all(1).any() or (d.valid == x).all(1).any() for x in small.test[:5])


def test_simplex_closed_forms():
    info = data.load("simplex").info
    assert [round(info[k], 2) for k in ("lambda_max", "collapsed_nll", "named_nll", "naming_gain")] == [0.72, 40.69, 34.47, 6.22]


def test_linear_gaussian_exact():
    d = data.load("linear_gaussian", n=40_000, D=4, d=2)
    W, c, s2 = (d.info[k] for k in ("W", "c", "s2"))
    x = d.train.double()
    assert torch.allclose(x.mean(0), c, atol=0.05) and torch.allclose(x.T.cov(), W @ W.T + s2 * torch.eye(4), atol=0.1)
    q = synthetic.linear_gaussian_posterior(x[:7], W, c, s2)
    precision = torch.eye(2) + W.T @ W / s2
    assert torch.allclose(q.mean, torch.linalg.solve(precision, W.T @ (x[:7] - c).T / s2).T)
    assert torch.allclose(torch.diag_embed(q.var), torch.linalg.inv(precision).expand(7, 2, 2), atol=1e-9)


def test_enumerable_world_certifies():
    world = synthetic.enumerable(symbols=64, latent_dim=3, std=1.5, seed=1)
    q, g = world.encode(world.symbols), torch.Generator().manual_seed(0)
    log_px = world.log_prob(world.symbols, q.sample(400, generator=g)).mean(0)
    for prior in world.priors().values():
        assert world.total(log_px - q.kl(prior).sum(-1)) < 1
    shrunk = synthetic.enumerable(symbols=64, latent_dim=3, std=0.1, fed_std=1.5, seed=1)
    assert torch.equal(shrunk.fed.mean, world.fed.mean)
    assert shrunk.total(log_px - shrunk.charged(shrunk.symbols).kl(shrunk.prior).sum(-1)) > 2
    with pytest.raises(ValueError, match="one bound per symbol"):
        world.total(torch.zeros(5))


@needs_omniglot
def test_omniglot_known_values():
    grey = data.load("omniglot", binarise=False, download=False)
    drawn = data.load("omniglot", download=False)
    assert [len(x) for x in (drawn.train, drawn.valid, drawn.test)] == [22_345, 2_000, 8_115]
    assert drawn.info["pixels"] == "as omniglot28.npz" and torch.equal(grey.train, drawn.train)
    p = grey.test
    expected = lambda m: (p * (1 - p) + (p - m) ** 2).sum((1, 2, 3)).mean().item()
    assert abs(p.sum((1, 2, 3)).mean() - 64.28) < 0.01 and abs(expected(0.) - 64.28) < 0.01
    assert abs(expected(grey.train.mean(0)) - 51.98) < 0.01
    assert abs(drawn.test.sum((1, 2, 3)).mean() - 64.28) < 0.15              # one draw of the test split
    t = grey.train.flatten(1)
    cov = t.T.cov(correction=0) + torch.diag((t * (1 - t)).mean(0))
    assert int((torch.linalg.eigvalsh(cov) > 0.5).sum()) == 19
    assert int(drawn.labels["test"].max()) == 49 and drawn.labels["test"].bincount(minlength=50).min() > 0


@needs_omniglot
def test_omniglot_subsets_are_the_same_bits():
    whole, few = data.load("omniglot", download=False), data.load("omniglot", download=False, n_train=300, n_valid=2000, n_test=40)
    rows = {x.numpy().tobytes() for x in whole.test}
    assert len(few.train) == 300 and len(few.test) == 40 and all(x.numpy().tobytes() in rows for x in few.test)
    assert torch.equal(whole.valid, few.valid)
    for params, message in ((dict(n_train=24_000), "n_train .* from 1 to 22345, got 24000"), (dict(n_test=9_000), "n_test .* 8115, got 9000"),
                            (dict(n_valid=0), "n_valid .* got 0"), (dict(source="drawing"), "'drawings' or 'iwae', got 'drawing'")):
        with pytest.raises(ValueError, match=message):
            data.load("omniglot", download=False, **params)
