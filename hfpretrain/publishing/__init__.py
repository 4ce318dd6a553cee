"""The Hub: repositories, the outbox of a run, pushing in the background, and the model card."""
