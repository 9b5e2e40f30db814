package tlscert

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"time"

	"go.uber.org/zap/zapcore"
)

// slogCore writes what certmagic logs, by zap, to where everything else goes. It
// tells every step as information: that is for whoever looks for a fault.
type slogCore struct {
	handler slog.Handler
	fields  []zapcore.Field
}

func slogLevel(l zapcore.Level) slog.Level {
	if l >= zapcore.ErrorLevel {
		return slog.LevelWarn // what it cannot do it tries again
	}
	return slog.LevelDebug
}

// Enabled implements zapcore.Core.
func (c slogCore) Enabled(l zapcore.Level) bool {
	return c.handler.Enabled(context.Background(), slogLevel(l))
}

// With implements zapcore.Core.
func (c slogCore) With(fields []zapcore.Field) zapcore.Core {
	return slogCore{c.handler, slices.Concat(c.fields, fields)}
}

// Check implements zapcore.Core.
func (c slogCore) Check(e zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return checked.AddCore(e, c)
	}
	return checked
}

// Write implements zapcore.Core.
func (c slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	values := zapcore.NewMapObjectEncoder()
	for _, f := range slices.Concat(c.fields, fields) {
		f.AddTo(values)
	}
	record := slog.NewRecord(time.Now(), slogLevel(e.Level), "acme: "+e.Message, 0)
	for _, name := range slices.Sorted(maps.Keys(values.Fields)) {
		record.AddAttrs(slog.Any(name, values.Fields[name]))
	}
	return c.handler.Handle(context.Background(), record)
}

// Sync implements zapcore.Core.
func (c slogCore) Sync() error { return nil }
