"""The Hub: repositories, the outbox of a run, the publisher and the model card."""
