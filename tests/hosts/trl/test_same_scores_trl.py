import trl
from packaging.version import Version

import same_scores
from checks import callback_of
from trl_harness import Maker


def conversations(rows):
    return [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows]


def tokenised(rows):
    return [
        {"input_ids": row["input_ids"], "completion_mask": [int(x != -100) for x in row["labels"]]}
        for row in map(same_scores.tokenised, rows)
    ]


def test_scores_are_those_of_the_other_hosts(tmp_path):
    # TRL 0.24 masks conversational prompts wrongly beside transformers 5, so there it is given tokens.
    prepare = conversations if Version(trl.__version__) >= Version("1.0") else tokenised
    maker = Maker(tmp_path, "sft", prepare(same_scores.ROWS), prepare(same_scores.HOLDOUT), completion_only_loss=True)
    trainer = maker(ica=same_scores.BLOCK, max_steps=1)
    print("largest difference in nats:", same_scores.check_same_scores(trainer, callback_of(trainer)))
