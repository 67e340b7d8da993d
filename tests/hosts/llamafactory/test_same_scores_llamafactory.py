from checks import callback_of
from llamafactory_harness import Maker
from same_scores import BLOCK, HOLDOUT, ROWS, check_same_scores


def test_scores_are_those_of_the_other_hosts(tmp_path, tiny_model):
    trainer = Maker(tmp_path, tiny_model, "sft", ROWS, HOLDOUT)(ica=BLOCK, max_steps=1)
    print("largest difference in nats:", check_same_scores(trainer, callback_of(trainer)))
