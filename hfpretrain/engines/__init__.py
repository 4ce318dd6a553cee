"""The ways to run a model on one process or many: what accelerate's file asks for, and what differs between them."""
