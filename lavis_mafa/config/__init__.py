"""What a YAML may say: settings, their checks and how they are read. Imports neither LAVIS nor torch before it must."""
