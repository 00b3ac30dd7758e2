"""What a run tells: logged values, metrics, outputs of steps, the plan for loggers."""
