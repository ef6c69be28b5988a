.PHONY: demo test slow docs bench
demo test slow docs bench:
	python3 dev.py $@
