package proxy

// OpenStreams returns how many requests the proxy works on, those to evicted
// sandboxes included.
func (p *Proxy) OpenStreams() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.open
}
