"""Check facts about real data that evaluation protocols depend on. The project does not contain the data."""

from pathlib import Path

import pytest

from sasrec import Interactions, ItemVocab, Sequences, read_events

ML_1M = Path(__file__).parents[4] / "shared" / "data" / "ml-1m" / "ratings.dat.gz"


@pytest.mark.skipif(not ML_1M.is_file(), reason=f"needs MovieLens 1M at {ML_1M}")
def test_movielens_1m_filtered_to_five_events_has_the_users_and_items_of_the_protocol() -> None:
    interactions = Interactions.from_events(read_events(ML_1M)).at_least(user_events=5, item_events=5)
    vocab = ItemVocab.from_items(interactions.item_ids)
    sequences = Sequences.build(interactions, vocab)
    assert (len(sequences), len(vocab)) == (6_040, 3_416)
    train, test = sequences.leave_last_out()
    assert len(test) == 6_040
    assert len(train.items) == len(interactions) - 6_040
