import same_scores
import tiny
from checks import callback_of


def test_scores_are_those_of_the_other_hosts(maker, tmp_path):
    # Axolotl's chat_template leaves the newline after a turn unsupervised; by segments it tokenises as the others do.
    def entry(name, rows):
        parts = [same_scores.segments(row) for row in rows]
        lines = [{"segments": [{"label": False, "text": p}, {"label": True, "text": a}]} for p, a in parts]
        return {"path": str(tiny.write_jsonl(tmp_path / name, lines)), "type": "input_output"}

    train, holdout = entry("rows.jsonl", same_scores.ROWS), entry("good.jsonl", same_scores.HOLDOUT)
    trainer = maker("sft", same_scores.ROWS, datasets=[train])(ica={**same_scores.BLOCK, "holdout": holdout}, max_steps=1)
    print("largest difference in nats:", same_scores.check_same_scores(trainer, callback_of(trainer)))
