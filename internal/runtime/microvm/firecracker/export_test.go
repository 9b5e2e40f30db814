package firecracker

// Binary and Jailer are the programs that were found.
func (f *Monitor) Binary() string { return f.cfg.Binary }
func (f *Monitor) Jailer() string {
	if f.jailer == "" {
		return NoJailer
	}
	return f.jailer
}
