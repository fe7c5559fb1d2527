"""The UNet, its branch, and what reads along: ControlNets, adapters, conditioning."""
