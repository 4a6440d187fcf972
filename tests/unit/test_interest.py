import dataclasses

import numpy as np
import pytest
import torch

from raysys.models.base import Retriever
from raysys.models.frozen_encoder import freeze_encoder
from raysys.models.interest import NO_EVIDENCE, InterestConfig, InterestEncoder, InterestRetriever
from raysys.queries import GAP_CODES, Queries, gap_codes

N = 30
SHAPES = [
    InterestConfig(dim=16, max_length=8, temperature=0.0),
    InterestConfig(dim=16, max_length=8, num_layers=1, num_heads=1, temperature=0.1),
    InterestConfig(dim=16, max_length=8, temperature=0.1, gated=True, positions="rotary", exclude_seen=True, time_gaps=True, recency=True),
]


def _encoder(config=SHAPES[0], num_event_types=2, seed=0):
    torch.manual_seed(seed)
    encoder = InterestEncoder(N, num_event_types, config)
    with torch.no_grad():  # larger than at the start of training, so that differences show
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        encoder.items.weight[N].zero_()
    return encoder.eval()


def _retriever(**kwargs):
    return InterestRetriever.from_encoder(_encoder(**kwargs), np.array([0, 0] + [1] * (N - 2)))


def _histories():
    rng = np.random.default_rng(0)
    return [rng.integers(0, N, length).tolist() for length in (3, 0, 8, 1, 20, 9)]


@pytest.mark.parametrize("config", SHAPES)
def test_later_events_do_not_change_earlier_states(config):
    encoder = _encoder(config)
    items = torch.randint(0, N, (2, 8))
    changed = items.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % N
    events = torch.ones_like(items)
    gaps, waits = torch.randint(0, 20, (2, 2, 8))
    before, after = encoder(items, events, gaps, waits), encoder(changed, events, gaps, waits)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().max() > 1e-3


@pytest.mark.parametrize("config", SHAPES)
def test_batch_equals_single(config):
    retriever = _retriever(config=config)
    together = retriever.scores(Queries.from_lists(_histories()))
    assert together.shape == (6, N) and together.dtype == np.float32 and np.isfinite(together).all()
    for row, history in enumerate(_histories()):
        np.testing.assert_allclose(retriever.scores(Queries.from_lists([history]))[0], together[row], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("config", SHAPES)
def test_the_last_state_alone_equals_that_of_all_positions(config):
    encoder, lengths = _encoder(config), torch.tensor([3, 8, 1])
    items = torch.randint(0, N, (3, 8))
    for row, length in enumerate(lengths):
        items[row, length:] = N
    events = torch.ones_like(items)
    gaps, waits = torch.randint(0, 20, (2, 3, 8))
    every = encoder(items, events, gaps, waits)[torch.arange(3), lengths - 1]
    torch.testing.assert_close(encoder.last_states(items, events, gaps, waits, lengths), every)


@pytest.mark.parametrize("num_event_types", [1, 3])
def test_a_remembered_history_is_not_encoded_again(num_event_types):
    plain, retriever = (_retriever(config=SHAPES[0], num_event_types=num_event_types) for _ in range(2))
    retriever.remember(10_000)
    memory = retriever._remembered
    for histories in (_histories(), _histories()[:3], [[*_histories()[0], 5]]):
        queries = Queries.from_lists(histories)
        np.testing.assert_allclose(retriever.user_vectors(queries), plain.user_vectors(queries), atol=1e-5)
    assert (memory.hits, memory.misses) == (3, 7)
    other_event = Queries.from_lists([_histories()[2]], events=[[1] * 8])
    retriever.user_vectors(other_event)
    assert memory.misses == 7 + (num_event_types > 1), "the kind of event counts where the encoder looks at it"


def test_what_is_remembered_has_a_bound_and_stays_right_beyond_it():
    plain, retriever = _retriever(), _retriever()
    retriever.remember(4)
    histories = [[row, row + 1] for row in range(10)]
    for _ in range(2):
        queries = Queries.from_lists(histories)
        np.testing.assert_allclose(retriever.user_vectors(queries), plain.user_vectors(queries), atol=1e-5)
    assert retriever._remembered._records.shape[:2] == (1, 4) and 0 < retriever._remembered.hits <= 4


def test_processes_of_a_node_share_what_they_encoded(tmp_path):
    """By the file: what one has encoded the other finds, but for an encoder with other weights and for a record that is torn."""
    queries = Queries.from_lists(_histories())
    first, second, other = _retriever(), _retriever(), _retriever(seed=1)
    for retriever in (first, second, other):
        retriever.remember(1000, str(tmp_path))
    vectors = first.user_vectors(queries)
    np.testing.assert_array_equal(second.user_vectors(queries), vectors)
    assert (second._remembered.hits, second._remembered.misses) == (6, 0)
    assert np.abs(other.user_vectors(queries) - vectors).max() > 1e-2 and other._remembered.hits == 0
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == 1000 * (16 + 4 * 16 + 8) and file.stat().st_mode & 0o777 == 0o600
    records = first._remembered._records
    records[records.any(axis=-1), 20] ^= 1  # as when half of a record is another's
    again = _retriever()
    again.remember(1000, str(tmp_path))
    np.testing.assert_array_equal(again.user_vectors(queries), vectors)
    assert again._remembered.hits == 0


@pytest.mark.parametrize("why", ["no folder", "another user's"])
def test_histories_are_remembered_without_a_file_where_there_can_be_none(tmp_path, caplog, monkeypatch, why):
    (tmp_path / "taken").write_text("")
    if why == "another user's":
        monkeypatch.setattr("os.getuid", lambda: 12345)
    retriever = _retriever()
    retriever.remember(10_000, str(tmp_path / ("taken" if why == "no folder" else "folder")))
    queries = Queries.from_lists(_histories())
    np.testing.assert_array_equal(retriever.user_vectors(queries), retriever.user_vectors(queries))
    assert retriever._remembered.hits == 6 and "by itself" in caplog.text


@pytest.mark.parametrize("recency", [False, True])
def test_the_moment_of_asking_counts_where_recency_was_learnt(recency):
    retriever = _retriever(config=dataclasses.replace(SHAPES[0], recency=recency))
    retriever.remember(1000)
    soon, later, as_late = (
        retriever.scores(Queries.from_lists([[4, 5, 6]], times=[[0, 60, 120]], now=[now])) for now in (130, 86_400, 86_500)
    )
    np.testing.assert_array_equal(later, as_late)  # the same power of two
    assert (np.abs(soon - later).max() > 1e-2) == recency
    assert retriever._remembered.misses == (2 if recency else 1)


def test_waits_by_hand():
    queries = Queries.from_lists([[1, 2], [], [3]], times=[[100, 107], [], [50]], now=[110, 5, 40])
    assert queries.waits.tolist() == [1 + 3, 1 + 2, 1]  # 7 s and 3 s; a clock that goes back counts as none
    assert queries.gaps.tolist() == [0, 1 + 3, 0]


def test_only_the_last_events_count():
    retriever = _retriever()
    long = list(range(20))
    scores = retriever.scores(Queries.from_lists([long, long[-8:], long[-7:]]))
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
    assert np.abs(scores[0] - scores[2]).max() > 1e-3


def test_empty_history_has_no_opinion_and_cold_items_come_last():
    scores = _retriever().scores(Queries.from_lists(_histories()))
    assert not scores[1].any()
    filled = np.delete(scores, 1, axis=0)
    assert (filled[:, :2] == np.float32(NO_EVIDENCE)).all()
    assert (filled[:, 2:] > NO_EVIDENCE / 2).all()


def test_seen_items_are_left_out_where_they_were_not_learnt():
    queries = Queries.from_lists([[5, 6], [7] * 20])
    plain, excluding = (_retriever(config=dataclasses.replace(SHAPES[0], exclude_seen=on)).scores(queries) for on in (False, True))
    seen = np.zeros((2, N), bool)
    seen[0, [5, 6]] = seen[1, 7] = True
    assert (excluding[seen] == np.float32(NO_EVIDENCE)).all()
    np.testing.assert_array_equal(excluding[~seen], plain[~seen])


def test_no_queries_give_no_rows():
    assert _retriever().scores(Queries.from_lists([])).shape == (0, N)


def test_scores_are_dot_products_with_the_item_vectors():
    retriever = _retriever(config=SHAPES[1])
    queries = Queries.from_lists([[5, 6, 7]])
    users = retriever.user_vectors(queries)
    np.testing.assert_allclose(retriever.scores(queries)[0, 2:], (users @ retriever.item_vectors.T)[0, 2:])
    np.testing.assert_allclose(np.linalg.norm(retriever.item_vectors, axis=1), 1.0, atol=1e-5)
    assert np.linalg.norm(users) == pytest.approx(1 / 0.1, rel=1e-4)


def test_event_types_matter_only_where_there_are_several():
    queries = [Queries.from_lists([[3, 4, 5]], events=[[code] * 3]) for code in (1, 2)]
    single, several = _retriever(), _retriever(num_event_types=3)
    np.testing.assert_array_equal(single.scores(queries[0]), single.scores(queries[1]))
    assert np.abs(several.scores(queries[0]) - several.scores(queries[1])).max() > 1e-3


def test_pauses_matter_only_where_they_are_learnt():
    histories = [[1, 2, 3]]
    fast, slow = (Queries.from_lists(histories, times=[[0, step, 2 * step]]) for step in (5, 86400))
    for config, differ in zip(SHAPES, (False, False, True), strict=True):
        retriever = _retriever(config=config)
        assert (np.abs(retriever.user_vectors(fast) - retriever.user_vectors(slow)).max() > 1e-3) == differ
    later = Queries.from_lists(histories, times=[[100, 105, 110]])  # what counts is the pause, not the date
    np.testing.assert_array_equal(retriever.user_vectors(fast), retriever.user_vectors(later))


def test_codes_of_pauses_by_hand():
    times = np.array([7, 7, 8, 11, 5, 5 + 86400, 2, 1 << 60])
    codes = gap_codes(times, np.array([0, 4, 4, 6, 8]))
    assert codes.tolist() == [0, 1, 2, 3, 0, 17, 0, GAP_CODES - 1]
    assert gap_codes(np.zeros(0, np.int64), np.array([0, 0])).tolist() == []


@pytest.mark.parametrize("config", SHAPES)
def test_arrays_bring_the_same_model_back(config):
    retriever = _retriever(config=config, num_event_types=4)
    arrays, meta = retriever.to_arrays()
    again = InterestRetriever.from_arrays(arrays, meta)
    queries = Queries.from_lists(_histories())
    np.testing.assert_array_equal(again.scores(queries), retriever.scores(queries))
    assert isinstance(again, Retriever)
    assert again.encoder.config == config


def test_a_retriever_leaves_the_encoder_it_came_from_alone():
    encoder = _encoder().train()
    retriever = InterestRetriever.from_encoder(encoder, np.ones(N))
    before = retriever.scores(Queries.from_lists([[1, 2, 3]]))
    assert encoder.training
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    np.testing.assert_array_equal(retriever.scores(Queries.from_lists([[1, 2, 3]])), before)


def test_training_noise_is_off_in_a_retriever():
    config = dataclasses.replace(SHAPES[0], dropout=0.5)
    retriever = InterestRetriever.from_encoder(_encoder(config).train(), np.ones(N))
    queries = Queries.from_lists([[1, 2, 3]])
    np.testing.assert_array_equal(retriever.scores(queries), retriever.scores(queries))


@pytest.mark.parametrize(
    "wrong", [{"dim": 10, "num_heads": 4}, {"dropout": 1.0}, {"temperature": -1.0}, {"max_length": 0}, {"dim": 6, "positions": "rotary"}]
)
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        InterestConfig(**wrong)


@pytest.mark.parametrize("config", SHAPES + [dataclasses.replace(SHAPES[2], num_layers=3, num_heads=4)])
def test_a_frozen_encoder_says_the_same_and_follows_its_table(config):
    plain, frozen = _retriever(config=config, num_event_types=3), _retriever(config=config, num_event_types=3)
    freeze_encoder(frozen)
    times = [np.cumsum(np.arange(len(history)) * 40).tolist() for history in _histories()]
    events = [[1 + place % 2 for place in range(len(history))] for history in _histories()]
    queries = Queries.from_lists(_histories(), events=events, times=times, now=[10_000] * 6)
    np.testing.assert_allclose(frozen.user_vectors(queries), plain.user_vectors(queries), atol=2e-5, rtol=1e-4)
    for row in range(6):
        one = queries[row : row + 1]
        np.testing.assert_allclose(frozen.user_vectors(one), plain.user_vectors(one), atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        for retriever in (plain, frozen):
            retriever.encoder.items.weight[2:] *= -1
    np.testing.assert_allclose(frozen.user_vectors(queries), plain.user_vectors(queries), atol=2e-5, rtol=1e-4)
