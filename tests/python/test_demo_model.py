"""The demo's model: what it carries in its state must be what it would have read again."""

import torch

from lightning_attn2_ext.demo import data, generate, model, train


def small():
    torch.manual_seed(0)
    net = model.LanguageModel(model.Size(layers=2, heads=2, head_dim=16, hidden=48, ngram_rows=512))
    torch.nn.init.normal_(net.head.weight, std=0.2)  # it starts at zero, which would hide everything
    return net


def test_prefill_in_pieces_is_the_whole():
    net = small()
    tokens = model.with_history(torch.randint(256, (2, 90)))
    with torch.inference_mode():
        whole = net(tokens)
        first, states = net.prefill(tokens[:, : model.HISTORY + 33], net.new_states(2))
        second, _ = net.prefill(tokens[:, 33:], states)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-5)


def test_decode_is_the_prefill():
    assert generate.agreement(small(), b"def forward(self, x): return x") < 1e-4


def test_no_position_sees_its_future():
    net = small()
    tokens = model.with_history(torch.randint(256, (1, 40)))
    other = tokens.clone()
    other[0, model.HISTORY + 25] += 1
    other %= 256
    with torch.inference_mode():
        a, b = net(tokens), net(other)
    assert torch.equal(a[:, :25], b[:, :25]) and not torch.equal(a[:, 25:], b[:, 25:])


def test_slopes_stay_float32():
    assert all(block.mixer.slope.dtype == torch.float32 for block in small().to(torch.bfloat16).blocks)


def test_held_out_bits_do_not_depend_on_the_segment():
    net, rows = small(), torch.randint(256, (2, 130), dtype=torch.uint8)
    whole, _ = train.held_out_bits(net, rows, segment=130)
    pieces, by_segment = train.held_out_bits(net, rows, segment=43)
    assert abs(whole - pieces) < 1e-4 and len(by_segment) == 3  # the last byte has none behind it


def test_the_split_is_by_file_and_fixed(tmp_path):
    for i in range(30):
        (tmp_path / f"f{i}.txt").write_bytes(bytes([65 + i]) * 50)
    first, second = data.load(str(tmp_path)), data.load(str(tmp_path))
    assert torch.equal(first.held_out, second.held_out) and torch.equal(first.train, second.train)
    newline = {10}
    assert set(first.train.tolist()) & set(first.held_out.tolist()) <= newline
    assert first.num_train_files + first.num_held_out_files == 30


def test_order0_entropy():
    assert data.order0_entropy(b"aabb") == 1.0
    assert data.order0_entropy(bytes(range(256))) == 8.0
