"""What is published about Meta-World's 50 tasks: the English instruction of each, and where the goal is only a dot.

Source: TASK_DESCRIPTIONS in src/lerobot/envs/metaworld_config.json of huggingface/lerobot (Apache-2.0), as published, so
that policies and datasets of others meet the words they know. Two traps in it: push-v3 and push-back-v3 share one text, and
no order or number of the tasks is common to all sources, so tasks are told apart by their names alone.
"""

INSTRUCTIONS = {
    "assembly-v3": "Pick up a nut and place it onto a peg",
    "basketball-v3": "Dunk the basketball into the basket",
    "bin-picking-v3": "Grasp the puck from one bin and place it into another bin",
    "box-close-v3": "Grasp the cover and close the box with it",
    "button-press-topdown-v3": "Press a button from the top",
    "button-press-topdown-wall-v3": "Bypass a wall and press a button from the top",
    "button-press-v3": "Press a button",
    "button-press-wall-v3": "Bypass a wall and press a button",
    "coffee-button-v3": "Push a button on the coffee machine",
    "coffee-pull-v3": "Pull a mug from a coffee machine",
    "coffee-push-v3": "Push a mug under a coffee machine",
    "dial-turn-v3": "Rotate a dial 180 degrees",
    "disassemble-v3": "Pick a nut out of a peg",
    "door-close-v3": "Close a door with a revolving joint",
    "door-lock-v3": "Lock the door by rotating the lock clockwise",
    "door-open-v3": "Open a door with a revolving joint",
    "door-unlock-v3": "Unlock the door by rotating the lock counter-clockwise",
    "drawer-close-v3": "Push and close a drawer",
    "drawer-open-v3": "Open a drawer",
    "faucet-close-v3": "Rotate the faucet clockwise",
    "faucet-open-v3": "Rotate the faucet counter-clockwise",
    "hammer-v3": "Hammer a screw on the wall",
    "hand-insert-v3": "Insert the gripper into a hole",
    "handle-press-side-v3": "Press a handle down sideways",
    "handle-press-v3": "Press a handle down",
    "handle-pull-side-v3": "Pull a handle up sideways",
    "handle-pull-v3": "Pull a handle up",
    "lever-pull-v3": "Pull a lever down 90 degrees",
    "peg-insert-side-v3": "Insert a peg sideways",
    "peg-unplug-side-v3": "Unplug a peg sideways",
    "pick-out-of-hole-v3": "Pick up a puck from a hole",
    "pick-place-v3": "Pick and place a puck to a goal",
    "pick-place-wall-v3": "Pick a puck, bypass a wall and place the puck",
    "plate-slide-back-side-v3": "Get a plate from the cabinet sideways",
    "plate-slide-back-v3": "Get a plate from the cabinet",
    "plate-slide-side-v3": "Slide a plate into a cabinet sideways",
    "plate-slide-v3": "Slide a plate into a cabinet",
    "push-back-v3": "Push the puck to a goal",
    "push-v3": "Push the puck to a goal",
    "push-wall-v3": "Bypass a wall and push a puck to a goal",
    "reach-v3": "Reach a goal position",
    "reach-wall-v3": "Bypass a wall and reach a goal",
    "shelf-place-v3": "Pick and place a puck onto a shelf",
    "soccer-v3": "Kick a soccer into the goal",
    "stick-pull-v3": "Grasp a stick and pull a box with the stick",
    "stick-push-v3": "Grasp a stick and push a box using the stick",
    "sweep-into-v3": "Sweep a puck into a hole",
    "sweep-v3": "Sweep a puck off the table",
    "window-close-v3": "Push and close a window",
    "window-open-v3": "Push and open a window",
}

GOAL_DOTS = {
    "coffee-pull-v3": "mug_goal",
    "pick-out-of-hole-v3": "goal",
    "pick-place-v3": "goal",
    "pick-place-wall-v3": "goal",
    "plate-slide-back-side-v3": "goal",
    "plate-slide-back-v3": "goal",
    "push-back-v3": "goal",
    "push-v3": "goal",
    "push-wall-v3": "goal",
    "reach-v3": "goal",
    "reach-wall-v3": "goal",
    "stick-pull-v3": "goal",
}
"""The site to leave visible, for tasks whose goal moves with the start position while nothing solid moves with it.

Every other dot is hidden: a real scene has none, and a dot would tell faucet-open from faucet-close without reading.
"""

MEASURED_JOINTS = {"faucet-open-v3": "knob_Joint_1", "faucet-close-v3": "knob_Joint_1"}
"""Tasks scored by the angle of a joint: on the faucets it says which way the knob went, which success doesn't."""
