"""What a run of programs needs around it: devices, processes, compiled programs as files, costs."""
