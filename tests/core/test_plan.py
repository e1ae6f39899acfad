"""The planner: every plan covers its problem, fits its device, and is the same each time; what it cannot plan it
says in a sentence."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

GOLDEN = Path(__file__).with_name("golden_plans.txt")
DEVICES = ("sm_80x108", "sm_86x84", "sm_89x128", "sm_90x132", "sm_100x148", "sm_120x170")
HEAD_DIMS = st.integers(1, 32).map(lambda n: 8 * n)


@st.composite
def problems(draw, core):
    problem = core.Problem()
    problem.backward = draw(st.booleans())
    problem.dtype = draw(st.sampled_from([core.DType.bf16, core.DType.fp16, core.DType.fp32, core.DType.fp64]))
    problem.heads = draw(st.integers(0, 128))
    problem.length = draw(st.one_of(st.integers(0, 300), st.integers(0, 2_000_000)))
    problem.dim_k, problem.dim_v = draw(HEAD_DIMS), draw(HEAD_DIMS)
    problem.packed = draw(st.booleans())
    problem.batch = 1 if problem.packed else draw(st.integers(0, 64))
    problem.num_seqs = draw(st.integers(0, 300)) if problem.packed else problem.batch
    problem.slope_grad = problem.backward and draw(st.booleans())
    return problem


def jobs(problem, plan):
    """(launch, Da, Dc) of the jobs, as csrc/core/plan.h describes them."""
    forward, dq = (problem.dim_k, problem.dim_v), (problem.dim_v, problem.dim_k)
    if not problem.backward:
        return [(0, *forward)]
    if plan.is_fused:
        return [(0, *dq), (1, *dq)]
    return [(0, *dq), (0, *dq), (len(plan.tiles) - 1, *forward)]


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_plans_cover_and_fit(core, data):
    problem = data.draw(problems(core))
    device = core.device(data.draw(st.sampled_from(DEVICES)))
    forced = data.draw(st.sampled_from(("", "", "segment_len=1000", "pieces=3", "family=sm80,segments=3,pieces=5")))
    try:
        plan = core.plan(problem, device, forced)
    except ValueError as error:
        assert "family sm80 has no kernels" in str(error)
        return
    assert 1 <= len(plan.tiles) <= (2 if problem.backward else 1)

    # Tiles: big enough for the contracted dim, in shared memory, and every column of Dc in exactly one slice.
    for launch, dim_a, dim_c in jobs(problem, plan):
        tile = plan.tiles[launch]
        assert tile.tile_a >= dim_a and tile.chunk > 0
        assert math.ceil(dim_c / tile.slice) * tile.slice >= dim_c
        if plan.family == core.Family.sm80:
            shared = core.sm80_shared_bytes(tile.tile_a, tile.slice, tile.chunk, problem.slope_grad)
            assert shared <= device.shared_per_block
        if plan.family == core.Family.sm90:
            assert device.compute_capability == 90 and tile.chunk == 64
            most = plan.max_blocks[launch]  # where they take turns: no more than the GPU holds
            assert most <= device.num_sms
            assert (problem.packed or plan.in_one_pass) == (most == 0)
    if plan.in_one_pass:  # every block is resident, with one item
        assert plan.family != core.Family.simt and not problem.backward and plan.num_segments > 1
        blocks = plan.num_units * problem.heads * math.ceil(problem.dim_v / plan.tiles[0].slice)
        assert blocks <= device.num_sms
    if plan.is_fused:  # dv's columns are dk's contracted ones: one slice is all of either
        assert plan.tiles[0].slice >= problem.dim_k and plan.tiles[0].tile_a >= problem.dim_v
    if plan.family == core.Family.sm90 and plan.num_segments > 1:
        first, second = plan.state_tiles
        assert (
            first.tile_a * math.ceil((problem.dim_k if problem.backward else problem.dim_v) / 64) * 64
            == (plan.state_floats[0])
        )
        if problem.backward and not plan.is_fused:
            assert second.tile_a >= problem.dim_k and plan.state_floats[1] >= problem.dim_k * problem.dim_v

    # Segments: whole chunks, every token of every sequence in exactly one.
    assert plan.segment_len % 64 == 0 and plan.segment_len > 0
    if problem.packed:
        cuts = sorted(data.draw(st.lists(st.integers(0, problem.length), max_size=max(problem.num_seqs - 1, 0))))
        lengths = [b - a for a, b in zip([0, *cuts], [*cuts, problem.length], strict=True)]
        lengths = (lengths + [0] * problem.num_seqs)[: problem.num_seqs]
    else:
        lengths = [problem.length] * problem.num_seqs
    segments = [max(1, math.ceil(n / plan.segment_len)) for n in lengths]
    assert sum(segments) <= plan.num_units
    if not problem.packed:
        assert sum(segments) == plan.num_units
    assert max(segments, default=1) <= plan.num_segments
    states = plan.num_units * plan.num_pieces * (2 if problem.backward else 1)  # of dq, and of dk and dv
    assert plan.local_states >= (states if plan.num_segments > 1 else 0)
    # Pieces: every chunk of a segment in exactly one, and a chunk or more in each.
    if plan.num_pieces > 1:
        assert plan.family != core.Family.simt and plan.num_segments > 1 and not plan.in_one_pass
        assert not problem.is_extend
        chunks = plan.segment_len // 64
        assert (plan.num_pieces - 1) * plan.piece_chunks < chunks <= plan.num_pieces * plan.piece_chunks

    # The slope gradient's slots, as first_chunk_slot numbers them (csrc/kernels/trilinear.h).
    if problem.slope_grad:
        chunk = plan.tiles[0].chunk
        start = slot = 0
        for sequence, length in enumerate(lengths):
            first = start // chunk + sequence
            assert first >= slot
            slot = first + math.ceil(length / chunk)
            start += length
        slices = math.ceil(problem.dim_k / plan.tiles[0].slice)
        assert 2 * slot * problem.heads * slices * 3 <= plan.dot_floats


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", (False, True))
def test_no_tokens(core, device, packed):
    """A batch of nothing has a plan as well, whatever share of the GPU its heads would take."""
    for heads in range(1, 180):
        problem = core.Problem()
        problem.backward, problem.dtype, problem.packed = True, core.DType.bf16, packed
        problem.batch = problem.num_seqs = 1
        problem.heads, problem.length, problem.dim_k, problem.dim_v = heads, 0, 128, 128
        for forced in ("", "segments=3", "segment_len=64", "segments=2,pieces=2"):
            plan = core.plan(problem, core.device(device), forced)
            assert plan.num_segments == 1 and plan.segment_len > 0 and plan.local_states == 0


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_same_problem_same_plan(core, data):
    problem = data.draw(problems(core))
    device = core.device(data.draw(st.sampled_from(DEVICES)))
    assert core.describe(problem, device, core.plan(problem, device)) == core.describe(
        problem, device, core.plan(problem, device)
    )


def everything(plan):
    def plain(value):
        if isinstance(value, list | tuple):
            return [plain(x) for x in value]
        return (value.tile_a, value.slice, value.chunk) if hasattr(value, "tile_a") else value

    return {name: plain(getattr(plan, name)) for name in dir(plan) if not name.startswith("_")}


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_recalled_plans_are_those_that_would_be_made(core, data):
    asked = data.draw(st.lists(problems(core), min_size=1, max_size=8))
    for problem in data.draw(st.lists(st.sampled_from(asked), max_size=40)):
        device, forced = (
            core.device(data.draw(st.sampled_from(DEVICES[:4]))),
            data.draw(st.sampled_from(("", "segments=2"))),
        )
        made = everything(core.plan(problem, device, forced))
        assert everything(core.recalled_plan(problem, device, forced)) == made


@pytest.mark.parametrize(
    ("question", "changes"),
    [
        (
            "1,8,{},128,128,bf16",
            [("backward", True), ("dtype", "fp32"), ("heads", 64), ("dim_k", 64), ("dim_v", 64)]
            + [
                ("is_extend", True),
                ("silu", True),
                ("mappable", False),
                ("num_sms", 16),
                ("compute_capability", 80),
                ("", "segments=5"),
            ],
        ),
        ("1,8,{},128,128,bf16,packed=3", [("num_seqs", 60)]),
        ("3,8,{},128,128,bf16,backward", [("slope_grad", True)]),
    ],
)
def test_plans_are_recalled_for_the_same_question_alone(core, question, changes):
    """Whatever differs, one at a time; at 200 lengths, so that some of each are kept in one place."""

    def ask(length, change="", value=""):
        problem, device = core.problem(question.format(length)), core.device("sm_90x132")
        if change:
            value = getattr(core.DType, value) if change == "dtype" else value
            setattr(device if hasattr(device, change) else problem, change, value)
        forced = "" if change else value
        made = everything(core.plan(problem, device, forced))
        assert everything(core.recalled_plan(problem, device, forced)) == made
        return made

    for change in changes:
        differ = [ask(length) != ask(length, *change) for length in range(4096, 4096 + 200 * 64, 64)]
        assert any(differ), f"{change} makes no difference here, and so shows nothing"


def test_refused_plans_are_not_remembered(core):
    problem, device = core.problem("1,8,4096,128,128,bf16"), core.device("sm_90x132")
    for _ in range(2):
        with pytest.raises(ValueError, match="slice 96"):
            core.recalled_plan(problem, device, "slice=96")
        assert everything(core.recalled_plan(problem, device)) == everything(core.plan(problem, device))


@given(text=st.text(alphabet="familysegt=,m80x1234567890-", max_size=30))
@settings(deadline=None)
def test_any_forced_text_is_a_plan_or_a_sentence(core, text):
    problem, device = core.problem("1,8,4096,128,128,bf16"), core.device("sm_90x132")
    try:
        core.plan(problem, device, text)
    except ValueError as error:
        assert len(str(error)) > 10


@given(text=st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=40))
@settings(deadline=None)
def test_any_problem_text_is_a_problem_or_a_sentence(core, text):
    for parse in (core.problem, core.device):
        try:
            parse(text)
        except ValueError as error:
            assert "expected" in str(error)


@pytest.mark.parametrize(
    "forced, sentence",
    [
        ("family=simt", "LA2_PLAN: family simt has no kernels for bf16, expected sm80"),
        ("family=sm70", "LA2_PLAN: family is 'sm70', expected simt, sm80 or sm90"),
        ("slice=96", "with slice 96"),
        ("passes=2", "LA2_PLAN: passes is '2', expected 1 or 3"),
        ("passes=1,segments=64", "cut so that all blocks are resident"),
        ("segments=0", "LA2_PLAN: segments is '0', expected a positive whole number"),
        ("segments=2,segment_len=64", "LA2_PLAN: segments and segment_len both say how sequences are cut"),
        (
            "chunk=64",
            "LA2_PLAN: unknown key 'chunk', expected family, slice, segments, segment_len, blocks, passes or pieces",
        ),
    ],
)
def test_forced_plans_that_cannot_be(core, forced, sentence):
    with pytest.raises(ValueError, match=".") as caught:
        core.plan(core.problem("1,8,4096,128,128,bf16"), core.device("sm_90x132"), forced)
    assert sentence in str(caught.value)


def test_forced_plans_are_taken(core):
    problem, device = core.problem("1,8,4096,128,128,bf16"), core.device("sm_90x132")
    plan = core.plan(problem, device, "slice=128,segments=3")
    assert plan.tiles[0].slice == 128 and plan.num_segments == 3


def test_few_heads_go_in_one_pass(core):
    """Out alone, where all blocks are resident; extend, whose units a table tells, in three."""
    device = core.device("sm_90x132")
    problem = core.problem("1,8,4096,128,128,bf16")
    assert core.plan(problem, device).in_one_pass
    assert not core.plan(problem, device, "passes=3").in_one_pass
    assert not core.plan(core.problem("1,64,4096,128,128,bf16"), device).in_one_pass
    assert core.plan(core.problem("1,8,4096,128,128,bf16,packed=1"), device).in_one_pass
    portable = core.plan(problem, device, "family=sm80")
    assert portable.in_one_pass and portable.num_units * 8 <= 132
    assert portable.state_floats[0] == 128 * 128
    assert not core.plan(problem, device, "family=sm80,passes=3").in_one_pass
    assert core.plan(problem, core.device("sm_80x108"), "family=sm80,passes=1").in_one_pass
    assert not core.plan(problem, core.device("sm_89x128")).in_one_pass  # 99 KB of shared memory
    backward = core.problem("1,8,4096,128,128,bf16,backward")
    assert not core.plan(backward, device, "family=sm80").in_one_pass
    with pytest.raises(ValueError, match="cut so that all blocks are resident"):
        core.plan(backward, device, "family=sm80,passes=1")
    problem.is_extend = True
    plan = core.plan(problem, device)
    assert not plan.in_one_pass and plan.family == core.Family.sm90


def test_long_segments_are_gathered_in_pieces(core):
    """Out alone, of sequences that are not packed, unless pieces are forced; never in extend or in one pass."""
    device = core.device("sm_90x132")

    def pieces(text, forced="passes=3", is_extend=False):
        problem = core.problem(f"1,8,{text}")
        problem.is_extend = is_extend
        return core.plan(problem, device, forced).num_pieces

    long = "32768,128,128,bf16"
    assert pieces(long) == pieces(f"{long},packed=1") == 4
    assert pieces(f"{long},backward") == pieces(f"{long},packed=20") == 1
    assert pieces(f"{long},backward", "segments=4,pieces=3") == pieces(f"{long},packed=20", "segments=4,pieces=3") == 3
    assert pieces(long, "segments=4,pieces=3", is_extend=True) == 1
    assert pieces("4096,128,128,bf16", "passes=1,pieces=2") == 1


@pytest.mark.parametrize("text", ("1,8,32768,128,128,bf16", "1,8,32768,128,128,bf16,backward"))
def test_workspace_of_packed_calls(core, text):
    """One state more than there are units in each workspace of Hopper's states: the neighbour of the last unit."""
    device = core.device("sm_90x132")

    def states(count, forced):
        problem = core.problem(text + count)
        plan = core.plan(problem, device, f"{forced},segments=8")
        line = core.describe(problem, device, plan)
        mebibytes = float(line.split("workspace ")[1].split(" MiB")[0])
        return mebibytes * 2**20 / (problem.heads * 128 * 128 * 4) - plan.local_states

    workspaces = 2 if "backward" in text else 1
    assert states(",packed=20", "family=sm90") == workspaces
    assert states("", "family=sm90") == states(",packed=20", "family=sm80") == 0


def test_portable_backwards_are_gathered_in_pieces(core):
    """The state pass of few heads leaves multiprocessors idle; that of many, of forwards and of packed sequences stays
    as it is, unless pieces are forced."""
    device = core.device("sm_90x132")

    def pieces(text, forced="", is_extend=False, where=device):
        problem = core.problem(text)
        problem.is_extend = is_extend
        return core.plan(problem, where, f"family=sm80{forced}").num_pieces

    few = "1,8,8192,128,128,bf16"
    assert pieces(f"{few},backward") > 1
    assert pieces(f"{few},backward,packed=1") > 1 and pieces(f"{few},backward", where=core.device("sm_80x108")) > 1
    assert pieces("4,32,4096,128,128,bf16,backward") == pieces("1,1,512,128,128,bf16,backward") == 1
    assert pieces(few) == pieces(few, ",passes=3") == pieces(f"{few},backward,packed=20") == 1
    assert pieces(few, ",passes=3,pieces=2") == pieces(f"{few},backward,packed=20", ",segments=4,pieces=2") == 2
    assert pieces(few, ",segments=4,pieces=2", is_extend=True) == 1
    plan = core.plan(core.problem("1,8,8192,128,128,fp32,backward"), device, "segments=4,pieces=2")
    assert plan.family == core.Family.simt and plan.num_pieces == 1


def test_a_short_last_segment_fills_what_whole_ones_leave(core):
    """Five segments of 8 heads are 120 blocks of 132 multiprocessors; cut a little shorter they leave 24 short ones, of
    which the 12 others walk two each."""
    device, problem = core.device("sm_90x132"), core.problem("1,8,8192,128,128,bf16,backward")
    plan = core.plan(problem, device, "family=sm80")
    assert (plan.num_segments, plan.segment_len) == (6, 1536)
    assert core.plan(problem, device, "family=sm80,segments=6").segment_len == 1408
    assert core.plan(problem, device, "family=sm80,segment_len=1500").segment_len == 1536
    assert core.plan(problem, device, "segment_len=9000000000000000000").num_segments == 1


def test_silu_is_taken_once_of_each_element(core):
    """It is most of a block's work, and in slices of 64 q and k go through it twice. In three passes, by kernels that
    there are up to a head dim of 192; other plans leave it to torch: where a call is short, Hopper's too."""
    device = core.device("sm_90x132")

    def plan(text, silu=True, where=device, forced=""):
        return core.plan(core.problem(text + (",silu" if silu else "")), where, forced)

    layer = "1,64,16384,128,128,bf16"
    assert (plan(layer, silu=False).tiles[0].slice, plan(layer, silu=False).num_segments) == (64, 1)
    assert (plan(layer).tiles[0].slice, plan(layer).num_segments) == (128, 2)
    assert plan(layer).takes_silu and not plan(layer, silu=False).takes_silu
    few = plan("1,8,8192,128,128,bf16", forced="family=sm90")
    assert few.takes_silu and few.num_segments > 1 and not few.in_one_pass
    short = plan("1,8,1024,128,128,bf16")
    assert not short.takes_silu and short.in_one_pass
    with pytest.raises(ValueError, match="silu is of a forward"):
        plan(layer + ",backward")
    portable = core.device("sm_80x108")
    for text, where in ((layer, portable), ("1,64,16384,256,128,bf16", device)):
        got, without = plan(text, where=where), plan(text, silu=False, where=where)
        assert not got.takes_silu and got.predicted_us > without.predicted_us + 300


def test_few_heads_of_many_requests_are_cut_in_narrow_slices(core):
    """What an item costs beside its chunks is more in slices of 128 (csrc/kernels/DESIGN.md, "extend")."""

    def plan(heads, is_extend):
        problem = core.problem(f"1,{heads},{16384 if is_extend else 32768},128,128,bf16,packed=20")
        problem.is_extend = is_extend
        return core.plan(problem, core.device("sm_90x132"))

    for is_extend in (True, False):
        few, many = plan(8, is_extend), plan(64, is_extend)
        assert few.num_segments > 1 and few.tiles[0].slice == 64
        assert many.num_segments == 1 and many.tiles[0].slice == 128


def test_the_device_may_leave_an_extend_whole(core):
    """Where its sequences may be cut, and LA2_PLAN does not say so: eight heads in two slices each on 132 SMs."""

    def plan(forced="", **changes):
        problem = core.problem("1,8,16384,128,128,bf16,packed=20")
        for name, value in ({"is_extend": True} | changes).items():
            setattr(problem, name, value)
        return core.plan(problem, core.device("sm_90x132"), forced)

    free = plan()
    assert free.num_segments > 1 and free.lanes == 132 // 16 and 0 < free.item_tokens < free.pass_tokens < 2048
    assert free.cuts_if_it_gains and not plan("segments=8").cuts_if_it_gains
    assert plan("segments=8").lanes == plan("segments=1").lanes == free.lanes
    assert plan(heads=64).lanes == 2 and not plan(heads=64).cuts_if_it_gains
    assert plan(heads=256).lanes == plan("family=sm80").lanes == plan(is_extend=False).lanes == 0
    # tests/ops/test_extend_cuda.py relies on it: 2,000 tokens are more than a segment and less than a lane has; 8,192
    # are more.
    for tokens, longest, gains in ((5 * 2000 + 15 * 425, 2000, False), (8192 + 19 * 431, 8192, True)):
        one = plan(length=tokens)
        of_lane = (tokens + 20 * one.item_tokens) // one.lanes
        assert one.segment_len < longest and (longest > of_lane + one.pass_tokens) == gains
    # Lanes are whole: one of 72 or 96 blocks would leave the other SMs idle.
    assert plan(heads=72).lanes == plan(heads=96).lanes == plan(heads=128).lanes - 1 == 0
    assert plan(heads=20).max_blocks[0] == 120
    assert not plan(heads=256, length=1 << 20).cuts_if_it_gains


def test_short_calls_take_the_kernels_that_start_soonest(core):
    """On Hopper the portable ones (csrc/kernels/DESIGN.md), where no plan of the others was forced."""
    device = core.device("sm_90x132")
    short, long = core.problem("1,8,256,128,128,bf16,backward"), core.problem("4,32,4096,128,128,bf16,backward")
    assert core.plan(short, device).family == core.Family.sm80
    assert core.plan(long, device).family == core.Family.sm90
    for forced in ("family=sm90", "blocks=1"):
        assert core.plan(short, device, forced).family == core.Family.sm90


def test_packed_items_have_a_block_each_unless_turns_are_forced(core):
    device = core.device("sm_90x132")
    for text, forced, most in (
        ("1,8,4096,128,128,bf16,packed=20", "", 0),
        ("1,8,4096,128,128,bf16,packed=20", "blocks=2", 264),
        ("1,8,4096,128,128,bf16", "", 132),
        ("1,8,4096,128,128,bf16", "blocks=99999999", 132_000),
    ):
        assert (
            core.plan(core.problem(text), device, f"family=sm90,slice=128{',' * bool(forced)}{forced}").max_blocks[0]
            == most
        )


def test_short_backwards_of_few_heads_are_cut_short(core):
    """csrc/kernels/DESIGN.md, "Fitted anew": 25 us at (1,4,1024) where segments of 256 tokens take 34."""
    device = core.device("sm_90x132")
    for text in ("1,1,512,128,128,bf16,backward", "1,4,1024,128,128,bf16,backward"):
        assert core.plan(core.problem(text), device).segment_len < 256
    assert core.plan(core.problem("1,8,1024,128,128,bf16,backward"), device).segment_len <= 256


def test_gradients_alone_have_slices_of_128_where_none_is_half(core):
    device = core.device("sm_90x132")
    for dims, slices in (("128,256", (64, 128)), ("256,128", (128, 64)), ("64,256", (64, 128)), ("128,192", (64, 64))):
        plan = core.plan(core.problem(f"4,32,4096,{dims},bf16,backward"), device)
        assert tuple(tile.slice for tile in plan.tiles) == slices, dims


def test_packed_plans_weigh_equal_lengths_and_one_long(core):
    """Few heads: one sequence with half of the tokens is cut. Many: nothing is gained by it. One sequence: as dense."""
    device = core.device("sm_90x132")
    assert core.plan(core.problem("1,8,16384,128,128,bf16,packed=20"), device).num_segments > 4
    assert core.plan(core.problem("1,64,32768,128,128,bf16,packed=20"), device).num_segments == 1
    for text in ("1,64,4096,128,128,bf16", "1,8,8192,128,128,bf16", "1,64,65536,128,128,bf16,backward"):
        dense, packed = (core.plan(core.problem(t), device) for t in (text, text + ",packed=1"))
        assert (dense.num_segments, dense.tiles[0].slice) == (packed.num_segments, packed.tiles[0].slice)


@pytest.mark.parametrize(
    "problem, device, sentence",
    [
        ("1,8,4096,128,128,bf16", "sm_80x108", "runs on compute capability 9.0 alone, the GPU has 8.0"),
        ("1,8,4096,128,128,fp32", "sm_90x132", "has kernels for bf16 and fp16 alone"),
        ("1,8,4096,128,128,bf16,backward,dslope", "sm_90x132", "has no slope gradient, expected sm80"),
    ],
)
def test_hopper_plans_that_cannot_be(core, problem, device, sentence):
    with pytest.raises(ValueError) as caught:
        core.plan(core.problem(problem), core.device(device), "family=sm90")
    assert sentence in str(caught.value)
    assert core.plan(core.problem(problem), core.device(device)).family != core.Family.sm90


def test_operands_without_tensor_maps_take_portable_kernels(core):
    problem, device = core.problem("1,8,4096,128,128,bf16"), core.device("sm_90x132")
    assert core.plan(problem, device).family == core.Family.sm90
    problem.mappable = False
    assert core.plan(problem, device).family == core.Family.sm80


def test_old_devices_are_refused(core):
    with pytest.raises(ValueError, match="compute capability 7.5, expected 8.0 or later"):
        core.plan(core.problem("1,8,4096,128,128,bf16"), core.device("sm_75x40"))


def golden_lines():
    return [line for line in GOLDEN.read_text().splitlines() if line and not line.startswith("#")]


def test_golden_plans(core):
    """Real shapes and the plan each gets. A change of the planner shows here as a diff: rewrite the file with
    `python tests/core/golden_plans.py` and read what moved."""
    assert len(golden_lines()) >= 30
    for line in golden_lines():
        problem_text, device_text, expected = line.split(" | ")
        problem, device = core.problem(problem_text), core.device(device_text)
        assert core.describe(problem, device, core.plan(problem, device)) == expected


@pytest.mark.parametrize(
    "problem, device, forced, sentence",
    [
        ("9223372036854775807,187,1,64,64,bf16", "sm_90x132", "", "batch times heads times length"),
        ("1,1,1,64,64,bf16,packed=9223372036854775807", "sm_90x132", "", "num_seqs times heads"),
        ("1,8,4096,64,64,bf16", "sm_90x132", "segments=9223372036854775807", None),
        ("1,8,4096,64,64,bf16", "sm_90x1", "family=sm90,segments=64", None),
    ],
)
def test_sizes_beyond_any_machine(core, problem, device, forced, sentence):
    """Found by tests/fuzz: products and sums that left 64 bits."""
    if sentence is None:
        plan = core.plan(core.problem(problem), core.device(device), forced)
        assert plan.segment_len == 64 and plan.num_segments == 64
        return
    with pytest.raises(ValueError, match=sentence):
        core.plan(core.problem(problem), core.device(device), forced)
