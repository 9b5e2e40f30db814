package files

import "testing"

func TestAcceptEncoding(t *testing.T) {
	for _, tc := range []struct {
		header         string
		gzip, identity bool
	}{
		{"", false, true},
		{"gzip", true, true},
		{"GZIP;Q=1", true, true},
		{"gzip, deflate, br", true, true},
		{"gzip;q=0", false, true},
		{"gzip;q=0.5, identity;q=0.9", false, true},
		{"gzip;q=0.5, identity;q=0", true, false},
		{"identity;q=0", false, false},
		{"*;q=0", false, false},
		{"*", false, true},
		{"*, identity;q=0", true, false},
		{"br;q=1, *;q=0", false, false},
		{"gzip;q=nonsense", true, true},
		{"gzip;q=NaN", true, true},
		{",,;q=1,", false, true},
	} {
		a := parseAcceptEncoding([]string{tc.header})
		if a.prefersGzip() != tc.gzip || a.identity() != tc.identity {
			t.Errorf("%q: got gzip %v, identity %v", tc.header, a.prefersGzip(), a.identity())
		}
	}
}

func FuzzAcceptEncodingNeverPanics(f *testing.F) {
	f.Add("gzip;q=0.5, identity;q=0")
	f.Add("*;q=1e400,;;=,gzip;q=-0")
	f.Fuzz(func(t *testing.T, header string) {
		for coding, weight := range parseAcceptEncoding([]string{header}) {
			if coding == "" || !(weight >= 0 && weight <= 1) {
				t.Errorf("%q: %q has weight %v", header, coding, weight)
			}
		}
	})
}
