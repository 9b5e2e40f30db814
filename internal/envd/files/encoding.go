package files

import (
	"strconv"
	"strings"
)

// acceptance is what a client takes, as weights from 0 (not at all) to 1.
type acceptance map[string]float64

// parseAcceptEncoding reads the Accept-Encoding header. Weights that cannot be
// read count as 1.
func parseAcceptEncoding(values []string) acceptance {
	a := make(acceptance)
	for _, value := range values {
		for item := range strings.SplitSeq(value, ",") {
			coding, params, _ := strings.Cut(item, ";")
			coding = strings.ToLower(strings.TrimSpace(coding))
			if coding == "" {
				continue
			}
			weight := 1.0
			if q, ok := strings.CutPrefix(strings.ToLower(strings.TrimSpace(params)), "q="); ok {
				if f, err := strconv.ParseFloat(strings.TrimSpace(q), 64); err == nil && f >= 0 && f <= 1 {
					weight = f
				}
			}
			a[coding] = weight
		}
	}
	return a
}

// prefersGzip reports whether gzip is asked for, at least as much as identity.
func (a acceptance) prefersGzip() bool {
	gzip, named := a["gzip"]
	if !named {
		// "*" means gzip only where identity is refused: nobody asked for it.
		return a["*"] > 0 && !a.identity()
	}
	return gzip > 0 && gzip >= a["identity"]
}

// identity reports whether the plain bytes are acceptable: unless refused.
func (a acceptance) identity() bool {
	if weight, named := a["identity"]; named {
		return weight > 0
	}
	if weight, named := a["*"]; named {
		return weight > 0
	}
	return true
}
