"""Log-probs of rows under the policy (`engine`), and the scores made from them (one file per scorer)."""
