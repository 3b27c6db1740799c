"""The gRPC server: thin services over teacher, runs and plugins. Nothing here decides anything about distillation."""
