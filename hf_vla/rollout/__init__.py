"""Driving a robot, simulated or real, with a policy, and measuring how well it goes."""
