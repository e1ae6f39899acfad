"""The demo's engine: however requests are batched, beamed or drafted, the bytes are those of one request at a time."""

import pytest
import torch

from lightning_attn2_ext.demo import engine, model, serve

la2 = torch.ops.la2
PROMPTS = [b"def f(x):", b"i", b"class A:\n    pass\n" * 9, b"import os\nimport sys", b"x = 1", b"\x00\xff\x80"]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = model.LanguageModel(model.Size(layers=2, heads=2, head_dim=16, hidden=48, ngram_rows=512))
    torch.nn.init.normal_(net.head.weight, std=0.2)  # it starts at zero, which would hide everything
    return net.eval()


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("options", ({}, {"layout": "vk"}), ids=str)
@pytest.mark.parametrize("slots", (1, 2, 6))
def test_continuous_batching_is_one_at_a_time(net, slots, options):
    served = engine.Engine(net, slots, **options)
    requests = []
    for i, prompt in enumerate(PROMPTS):
        requests.append(served.submit(prompt, 12 - i))
        served.step()  # others are under way when it comes
    served.run()
    for i, request in enumerate(requests):
        assert request.written == engine.one_at_a_time(net, PROMPTS[i], 12 - i)
        assert request.slot is None and request.margin > 1e-5
    assert len({r.written[:5] for r in requests}) > 3  # they do write different things
    assert served.most_running == min(slots, 6) and served.pool.num_free == slots


def test_a_request_of_nothing_is_refused(net):
    for prompt, count in ((b"", 3), (b"a", 0)):
        with pytest.raises(ValueError, match="expected at least 1"):
            engine.Engine(net, 1).submit(prompt, count)


def test_one_beam_is_greedy(net):
    (beam,) = engine.beam_search(net, PROMPTS[0], 9, 1)
    assert beam.text == engine.one_at_a_time(net, PROMPTS[0], 9)


def test_beams_have_the_scores_of_their_texts(net):
    beams = engine.beam_search(net, PROMPTS[2], 9, 5)
    assert len({beam.text for beam in beams}) == 5
    assert [b.score for b in beams] == sorted((b.score for b in beams), reverse=True)
    for beam in beams:
        assert abs(beam.score - engine.score(net, PROMPTS[2], beam.text)) < 1e-4


def test_beams_of_all_bytes_find_the_best_pair(net):
    beams = engine.beam_search(net, PROMPTS[0], 2, 256)
    (best,) = beams[:1]
    firsts = [bytes([a]) for a in range(256)]
    tokens = torch.tensor([[0, 0, 0, *PROMPTS[0], a] for a in range(256)])
    chances = torch.log_softmax(net(tokens)[:, -1].double(), -1)
    whole = chances + torch.tensor([[engine.score(net, PROMPTS[0], a)] for a in firsts])
    assert abs(whole.max().item() - best.score) < 1e-4
    assert divmod(int(whole.argmax()), 256) == tuple(best.text)


@pytest.mark.parametrize("draft", (1, 4, 15))
def test_drafts_change_nothing_but_the_rounds(net, draft):
    plain = [engine.one_at_a_time(net, prompt, 14) for prompt in PROMPTS]
    drafted = engine.speculate(net, PROMPTS, 14, draft)
    assert drafted.texts == plain
    ahead = dict(zip(PROMPTS, plain, strict=True))

    def oracle(text, count):
        prompt = max((p for p in PROMPTS if text.startswith(p)), key=len)
        return (ahead[prompt] + bytes(count))[len(text) - len(prompt) :][:count]

    known = engine.speculate(net, PROMPTS, 14, draft, guess=oracle)
    assert known.texts == plain and known.rounds == -(-13 // (draft + 1)) and sum(known.accepted) >= 6 * 6
    wrong = engine.speculate(
        net, PROMPTS, 14, draft, guess=lambda text, count: bytes(b ^ 1 for b in oracle(text, count))
    )
    assert wrong.texts == plain and wrong.rounds == 13 and not any(wrong.accepted)


def test_guess():
    assert engine.guess(b"abcd abcd ab", 4) == b"cd a"
    assert engine.guess(b"xay", 2) == b"\0\0" and engine.guess(b"aab", 3) == b"\0\0\0"
    assert engine.guess(b"abXab", 9) == b"Xab" + bytes(6)


def test_weights_are_kept(net, tmp_path):
    serve.save(net, tmp_path / "model.pt")
    again = serve.load(tmp_path / "model.pt", torch.device("cpu"))
    assert engine.one_at_a_time(again, PROMPTS[0], 20) == engine.one_at_a_time(net, PROMPTS[0], 20)


@pytest.mark.gpu
def test_served_on_a_gpu(net):
    served = engine.Engine(net.cuda(), 3)
    requests = [served.submit(prompt, 10) for prompt in PROMPTS]
    served.run()
    drafted = engine.speculate(net, PROMPTS, 10)
    try:
        alone = [engine.one_at_a_time(net, prompt, 10) for prompt in PROMPTS]
    finally:
        net.cpu()
    assert [request.written for request in requests] == alone == drafted.texts
