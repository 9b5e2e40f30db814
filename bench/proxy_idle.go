package bench

import "context"

func (b *proxyBench) measureIdle(ctx context.Context) error { return ctx.Err() }
